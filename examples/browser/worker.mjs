// Loads the model and makes text beside the page, so that the page stays awake.
//
// Messages in:  { kind: "generate", prompt, ...options } | { kind: "stop" }
// Messages out: { kind: "loading", text } | { kind: "ready", settings, seconds } | { kind: "token", token, text }
//               | { kind: "done" } | { kind: "error", text }

import * as ort from "./ort.wasm.bundle.min.mjs";
import { Tokenizer } from "./tokenizers.min.mjs";
import { TextModel } from "./generate.mjs";

// Threads need shared memory, which browsers allow on pages with COOP and COEP headers (prepare.py --serve sends them).
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

let stop = new AbortController();
const loaded = load().catch((error) => postMessage({ kind: "error", text: `The model cannot be loaded. ${error.message}` }));

onmessage = async ({ data: { kind, prompt, ...options } }) => {
  if (kind === "stop") return stop.abort();
  const model = await loaded;
  if (!model) return;
  stop = new AbortController();
  try {
    for await (const { token, text } of model.generate(prompt, { ...options, signal: stop.signal })) {
      postMessage({ kind: "token", token, text });
      await messages();
    }
    postMessage({ kind: "done" });
  } catch (error) {
    postMessage({ kind: "error", text: error.message });
  }
};

async function load() {
  const start = performance.now();
  const [settings, tokenizer] = await Promise.all([json("model.json"), json("tokenizer.json")]);
  const bytes = await download("model.onnx", settings.bytes);
  postMessage({ kind: "loading", text: "Opening the model …" });
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  const model = new TextModel(ort, session, new Tokenizer({ ...tokenizer, truncation: null, padding: null }, {}), settings);
  postMessage({ kind: "ready", settings, seconds: (performance.now() - start) / 1000 });
  return model;
}

async function json(file) {
  return (await request(file)).json();
}

async function request(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  return response;
}

/** The file as bytes, with news about how far it is. */
async function download(file, size) {
  const reader = (await request(file)).body.getReader();
  const parts = [];
  let got = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    got += part.value.length;
    postMessage({ kind: "loading", text: `Loading the model … ${Math.round((100 * got) / size)} %` });
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** Lets waiting messages in, such as "stop". */
function messages() {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      channel.port1.close();
      resolve();
    };
    channel.port2.postMessage(0);
  });
}

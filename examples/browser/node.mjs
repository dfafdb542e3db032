// Text from a prepared folder in Node: node examples/browser/node.mjs SITE "Return the" [TOKENS] [LOOPS]
// Uses onnxruntime-node where it is installed, and WebAssembly elsewhere.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import { TextModel } from "./generate.mjs";

const [folder, prompt, count = "64", loops] = process.argv.slice(2);
if (prompt === undefined) {
  console.error('usage: node node.mjs SITE PROMPT [TOKENS] [LOOPS]   (SITE: a folder that prepare.py wrote)');
  process.exit(2);
}

const ort = await import("onnxruntime-node").catch(() => import("onnxruntime-web/wasm"));
ort.env.wasm.numThreads = 1; // WebAssembly in Node cannot start threads from its bundle
const json = async (file) => JSON.parse(await readFile(join(folder, file), "utf8"));
const session = await ort.InferenceSession.create(await readFile(join(folder, "model.onnx")));
const model = new TextModel(ort, session, new Tokenizer({ ...(await json("tokenizer.json")), truncation: null, padding: null }, {}), await json("model.json"));

process.stdout.write(prompt);
const start = performance.now();
const tokens = [];
const options = { maxNewTokens: Number(count), loops: loops && Number(loops) };
for await (const { token, text } of model.generate(prompt, options)) {
  tokens.push(token);
  process.stdout.write(text);
}
const seconds = (performance.now() - start) / 1000;
process.stdout.write("\n");
console.error(`${tokens.length} tokens in ${seconds.toFixed(1)} s: ${tokens.join(" ")}`);

// Text from an exported program, token by token. The page's worker and the Node script both use this file.

/** What ends in front of a cache's number in the file's inputs and outputs. */
const PAST = "past_key_values", PRESENT = "present";

export class TextModel {
  /**
   * @param ort        the module onnxruntime-web (or onnxruntime-node)
   * @param session    an InferenceSession of a file written with `loopq-compile export --cache`
   * @param tokenizer  a Tokenizer of @huggingface/tokenizers
   * @param settings   model.json as prepare.py writes it: { loops, rolled, end_tokens }
   */
  constructor(ort, session, tokenizer, settings) {
    this.ort = ort;
    this.session = session;
    this.tokenizer = tokenizer;
    this.settings = settings;
    this.caches = session.inputMetadata.filter((input) => input.name.startsWith(`${PAST}.`));
    if (!this.caches.length) throw new Error("This file has no key-value cache: export it with --cache.");
  }

  /**
   * Continues `prompt`; yields { token, text } for every new token. `text` is what can be shown already: half of a
   * character waits for its other half.
   *
   * temperature 0 takes the most likely token; otherwise tokens are drawn from the most likely ones that add up to topP.
   * An AbortSignal ends the text.
   */
  async *generate(prompt, { maxNewTokens = 64, temperature = 0, topP = 1, seed = 0, loops, signal } = {}) {
    const { tokenizer, settings } = this;
    const start = tokenizer.encode(prompt).ids;
    if (!start.length) throw new Error("The prompt is empty: it has no token.");
    const random = randomNumbers(seed);
    const all = [...start];
    let past = this.#emptyCaches(loops ?? settings.loops);
    let fresh = start;
    let shown = this.#decode(all);
    for (let made = 1; made <= maxNewTokens && !signal?.aborted; made++) {
      const results = await this.session.run(this.#feed(fresh, all.length, past, loops), this.#wanted());
      past = Object.fromEntries(this.caches.map(({ name }) => [name, results[presentName(name)]]));
      const logits = lastRow(results.logits);
      const token = temperature > 0 ? draw(logits, temperature, topP, random()) : largest(logits);
      if (settings.end_tokens.includes(token)) return;
      fresh = [token];
      all.push(token);
      const text = this.#decode(all);
      const whole = made === maxNewTokens || !text.endsWith("\ufffd");
      yield { token, text: whole ? text.slice(shown.length) : "" };
      if (whole) shown = text;
    }
  }

  #decode(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }

  #wanted() {
    return ["logits", ...this.caches.map(({ name }) => presentName(name))];
  }

  /** Caches before the first token: no position yet, of one sequence. */
  #emptyCaches(loops) {
    const sizes = { batch: 1, past: 0, loops };
    const empty = ({ name, shape }) => [
      name,
      new this.ort.Tensor("float32", new Float32Array(0), shape.map((size) => sizes[size] ?? size)),
    ];
    return Object.fromEntries(this.caches.map(empty));
  }

  /** The inputs of one step: the tokens that no step has had yet, and what earlier ones left. */
  #feed(ids, total, past, loops) {
    const integers = (values, shape) => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
    const feed = {
      input_ids: integers(ids, [1, ids.length]),
      attention_mask: integers(new Array(total).fill(1), [1, total]),
      ...past,
    };
    if (this.settings.rolled) feed.loops = integers([loops ?? this.settings.loops], []);
    return feed;
  }
}

function presentName(name) {
  return PRESENT + name.slice(PAST.length);
}

/** Logits of the last token, of `[1, sequence, vocabulary]`. */
function lastRow({ data, dims }) {
  return data.subarray(data.length - dims[2]);
}

export function largest(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}

/** A token drawn from softmax(logits / temperature), from the most likely ones that add up to topP; 0 <= number < 1. */
export function draw(logits, temperature, topP, number) {
  const top = logits[largest(logits)];
  const weights = Array.from(logits, (value) => Math.exp((value - top) / temperature));
  const sum = weights.reduce((a, b) => a + b, 0);
  const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]);
  const kept = [];
  let mass = 0;
  for (const token of order) {
    if (mass >= topP * sum) break;
    kept.push(token);
    mass += weights[token];
  }
  let left = number * mass;
  for (const token of kept) {
    left -= weights[token];
    if (left < 0) return token;
  }
  return kept.at(-1);
}

/** Numbers from 0 to 1 that the same seed repeats: a counter, mixed by multiplications and shifts. */
export function randomNumbers(seed) {
  let counter = seed >>> 0;
  return () => {
    counter = (counter + 0x9e3779b9) >>> 0;
    let mixed = Math.imul(counter ^ (counter >>> 16), 0x21f0aaad);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97);
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 32;
  };
}

// smallm.js: generates and scores text with a smallm model, in browsers, workers, Node, Deno and Bun.
//
//   import { LanguageModel } from "./smallm.js";
//   const lm = await LanguageModel.load("model.onnx");
//   for await (const { text, surprisal } of lm.stream("Once", { maxLength: 200, rngSeed: 1 })) { … }
//
// The model runs in smallm.wasm, which is smallm.c compiled to WebAssembly: the same model, seed text and options give the
// same text as in C, to the byte. smallm.d.ts documents every call. A mistake of the caller is an Error whose message is
// one sentence. MIT licence.

const DONE = 1; // of the statuses in smallm.h; larger ones are errors
const TOGETHER = 32; // texts that generateMany computes at the same time; each needs a KV cache
const YIELD_AFTER = 16; // milliseconds after which the page may paint and handle input
const WASM = new URL("smallm.wasm", import.meta.url);
const NO_MEMORY = "there is not enough memory for this; use a smaller model";
const OPTIONS_SIZE = 104;
const OVERFLOWS = ["crop", "shift", "slide"];
const U32 = { type: "Uint32", max: 2 ** 32 - 1, rule: "a whole number from 0 to 4294967295" };
const LENGTH = { type: "BigInt64", rule: "a whole number from 0 to 9007199254740991" };
// The options, and for numbers the place, type and range of the field of `smallm_options`. A missing option has the
// default of smallm_default_options.
const OPTIONS = {
  maxLength: { at: 8, ...LENGTH },
  temperature: { at: 16, max: Number.MAX_VALUE, rule: "0 or more (0 = the likeliest character)" },
  topK: { at: 24, type: "BigInt64", rule: "a whole number, 0 or more (0 = all ids)" },
  topP: { at: 32, min: Number.MIN_VALUE, max: 1, rule: "above 0 and at most 1 (1 = all ids)" },
  minP: { at: 40, max: 1, rule: "from 0 to 1 (0 = all ids)" },
  repetitionPenalty: { at: 48, min: 0.01, max: 100, rule: "from 0.01 to 100 (1 = off)" },
  repetitionWindow: { at: 56, type: "BigInt64", rule: "from 0 to block_size = {block_size} (0 = block_size)" },
  allowed: null,
  banned: null,
  rngSeed: { at: 64, ...U32 },
  streamNumber: { at: 68, ...U32 },
  stop: null,
  minLength: { at: 80, ...LENGTH },
  overflow: null,
  signal: null,
};
const METADATA = {
  format_version: 1, block_size: 0, n_layer: 0, n_head: 0, n_kv_head: 0, n_embd: 0, head_dim: 0, vocab_size: 0, window: 0,
  rope_theta: 10000, tokens: "", start_text: "", sampling: {}, training: {}, precision: "fp32", quality: {},
  checksum: 0,
};

export class LanguageModel {
  #engine;

  static async load(model, { wasm = WASM } = {}) {
    const [[bytes, name], module] = await Promise.all([read(model, "model"), compile(wasm)]);
    const instance = await WebAssembly.instantiate(module, {});
    return new LanguageModel(new Engine(instance.exports, bytes, name));
  }

  /** Use `load`. */
  constructor(engine) {
    this.#engine = engine;
    this.metadata = engine.metadata;
    this.blockSize = this.metadata.block_size;
    this.vocabSize = this.metadata.vocab_size;
  }

  async generate(seed = "", options = {}) {
    const chunks = [seed];
    const text = new Text(this.#engine, seed, resolve(options, this.metadata));
    const breath = new Breath(options.signal);
    try {
      for (;;) {
        if (breath.isDue()) await breath.take();
        const chunk = text.next();
        if (chunk === null) return chunks.join("");
        chunks.push(chunk);
      }
    } finally {
      text.close();
    }
  }

  async generateMany(seeds, options = {}) {
    const engine = this.#engine;
    const all = Array.from(seeds, (seed) => [seed]);
    const { streamNumber = 0, signal, ...config } = resolve(options, this.metadata);
    check("streamNumber", streamNumber + Math.max(0, all.length - 1), OPTIONS.streamNumber);
    const breath = new Breath(signal);
    for (let from = 0; from < all.length; from += TOGETHER) {
      const group = all.slice(from, from + TOGETHER);
      const texts = [];
      try {
        group.forEach(([seed], i) => texts.push(new Text(engine, seed, { ...config, streamNumber: streamNumber + from + i })));
        for (let running = texts; running.length > 0; ) {
          if (breath.isDue()) await breath.take();
          engine.step(running.map((text) => text.context));
          running = running.filter((text) => {
            const chunk = engine.chunk("take", text.context);
            if (chunk) group[texts.indexOf(text)].push(chunk);
            return chunk !== null;
          });
        }
      } finally {
        texts.forEach((text) => text.close());
      }
    }
    return all.map((parts) => parts.join(""));
  }

  stream(seed = "", options = {}) {
    return new TextStream(new Text(this.#engine, seed, { ...resolve(options, this.metadata), logprobs: true }));
  }

  async nextCharacters(text, n = 10) {
    check("n", n, { type: "BigInt64", rule: "a whole number, 0 or more" });
    return this.#engine.nextCharacters(wellFormed(text, "the seed text"), Math.min(n, 0x110000));
  }

  async score(text) {
    return this.#engine.score(wellFormed(text, "the text"));
  }

  async perplexity(text) {
    const nats = await this.score(text);
    const characters = nats.length - 1;
    if (characters < 1) throw new Error(`the text has ${nats.length} character(s); perplexity needs at least 2`);
    const natsPerChar = nats.subarray(1).reduce((sum, x) => sum + x, 0) / characters;
    const bitsPerChar = natsPerChar / Math.LN2;
    return { natsPerChar, bitsPerChar, perplexity: Math.exp(Math.min(natsPerChar, 700)), characters };
  }

  async release() {
    this.#engine.release();
  }
}

/** An async iterator over the characters of a text. */
class TextStream {
  #text;
  #pieces;

  constructor(text) {
    this.#text = text;
    this.#pieces = text.pieces();
  }

  [Symbol.asyncIterator]() {
    return this;
  }

  next() {
    return this.#pieces.next();
  }

  return(value) {
    this.#text.close();
    return this.#pieces.return(value);
  }

  branch({ rngSeed, streamNumber = 0 } = {}) {
    return new TextStream(this.#text.copy(rngSeed, streamNumber));
  }
}

/** A context of smallm.c that writes one text. */
class Text {
  static #abandoned = new FinalizationRegistry(({ engine, context }) => engine.free(context));
  #ready = []; // pieces that were computed and not taken yet

  constructor(engine, seed, config, context) {
    this.engine = engine;
    this.config = config;
    this.context = context ?? engine.start(wellFormed(seed, "the seed text"), config);
    Text.#abandoned.register(this, { engine, context: this.context }, this);
  }

  close() {
    if (!this.context) return;
    Text.#abandoned.unregister(this);
    this.engine.free(this.context);
    this.context = 0;
  }

  /** A text that continues from here, with other random numbers if rngSeed is given. */
  copy(rngSeed, streamNumber) {
    if (!this.context) throw new Error("the stream has ended; branch it before its end");
    if (rngSeed !== undefined) check("rngSeed", rngSeed, U32);
    check("streamNumber", streamNumber, U32);
    const other = new Text(this.engine, "", this.config, this.engine.copy(this.context, rngSeed, streamNumber));
    other.#ready = [...this.#ready];
    return other;
  }

  /** The next chunk, or null at the end. */
  next() {
    return this.context === 0 ? null : this.engine.chunk("next", this.context);
  }

  async *pieces() {
    const breath = new Breath(this.config.signal);
    try {
      for (;;) {
        while (this.#ready.length > 0) yield this.#ready.shift();
        if (breath.isDue()) await breath.take();
        const chunk = this.next();
        if (chunk === null) return;
        const logprobs = this.engine.logprobs(this.context);
        this.#ready = Array.from(chunk, (text, i) => ({ text, surprisal: 0 - logprobs[i] }));
      }
    } finally {
      this.close();
    }
  }
}

/** Lets the page paint and handle input now and then, and throws if a signal is aborted. */
class Breath {
  #taken = performance.now();

  constructor(signal) {
    this.signal = signal;
  }

  isDue() {
    this.signal?.throwIfAborted();
    return performance.now() - this.#taken > YIELD_AFTER;
  }

  async take() {
    await new Promise((resolve) => {
      const { port1, port2 } = new MessageChannel(); // a timer would take four milliseconds
      port1.onmessage = () => {
        port1.close();
        resolve();
      };
      port2.postMessage(0);
    });
    this.#taken = performance.now();
    this.signal?.throwIfAborted();
  }
}

// -- smallm.c

/** An instance of smallm.wasm with a model. Pointers are numbers; each instance has its own memory. */
class Engine {
  #c; // the functions of smallm.h
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #result; // 8 bytes for results that a function returns through pointers
  #model;

  constructor(exports, bytes, name) {
    this.#c = exports;
    this.#result = this.#allocate(8);
    const data = this.#put(bytes);
    const status = exports.smallm_open_memory(data, bytes.length, 0, this.#result);
    exports.free(data);
    this.#model = this.#pointer(this.#result);
    if (status !== 0) {
      const message = this.#string(exports.smallm_model_error(this.#model));
      const isPage = /^\s*</.test(new TextDecoder().decode(bytes.subarray(0, 100)));
      throw new Error(isPage ? `${name} is a web page, not a model; check the address` : message.replace("the model", name).replaceAll("smallm.c", "smallm.js"));
    }
    this.metadata = this.#metadata(name);
  }

  release() {
    this.#c = null; // and with it the memory
  }

  get #smallm() {
    if (this.#c === null) throw new Error("the model was released; load it again");
    return this.#c;
  }

  get #view() {
    return new DataView(this.#smallm.memory.buffer);
  }

  #bytes(at, length) {
    return new Uint8Array(this.#smallm.memory.buffer, at >>> 0, length);
  }

  #pointer(at) {
    return this.#view.getUint32(at, true);
  }

  #allocate(bytes) {
    const at = this.#smallm.malloc(bytes) >>> 0;
    if (at === 0) throw new Error(NO_MEMORY);
    return at;
  }

  /** Copies bytes and a NUL into the memory. */
  #put(bytes) {
    const at = this.#allocate(bytes.length + 1);
    const copy = this.#bytes(at, bytes.length + 1);
    copy.set(bytes);
    copy[bytes.length] = 0;
    return at;
  }

  #text(at, length) {
    return this.#decoder.decode(this.#bytes(at, length));
  }

  /** A text that ends with NUL. */
  #string(at) {
    const rest = new Uint8Array(this.#smallm.memory.buffer, at >>> 0);
    return this.#text(at, rest.indexOf(0));
  }

  /** Calls `use` with an allocator of memory that is free again afterwards; it takes a size, or bytes to copy. */
  #with(use) {
    const taken = [];
    try {
      return use((wanted) => {
        taken.push(typeof wanted === "number" ? this.#allocate(wanted) : this.#put(wanted));
        return taken.at(-1);
      });
    } finally {
      taken.forEach((at) => this.#c?.free(at));
    }
  }

  #check(context, status) {
    if (status > DONE) throw new Error(this.#string(this.#smallm.smallm_error(context)));
    return status;
  }

  #metadata(name) {
    const found = {};
    for (const [key, usual] of Object.entries(METADATA)) {
      const at = this.#with((put) => this.#smallm.smallm_metadata(this.#model, put(utf8(`smallm.${key}`)), this.#result));
      try {
        found[key] = at === 0 ? usual : JSON.parse(this.#text(at, this.#pointer(this.#result)));
      } catch {
        found[key] = undefined;
      }
      if (kind(found[key]) !== kind(usual)) throw new Error(`${name} has broken metadata; export the model again`);
    }
    return found;
  }

  #newContext() {
    if (this.#smallm.smallm_context_new(this.#model, this.#result) !== 0) throw new Error(NO_MEMORY);
    return this.#pointer(this.#result);
  }

  /** A context at the beginning of a text. */
  start(seed, config) {
    const context = this.#newContext();
    try {
      this.#with((put) => {
        const options = put(OPTIONS_SIZE);
        this.#smallm.smallm_default_options(this.#model, options, OPTIONS_SIZE);
        const stops = config.stops.map((word) => put(utf8(word)));
        const stopList = put(4 * stops.length);
        const strings = [config.allowed, config.banned].map((text) => (text === undefined ? 0 : put(utf8(text))));
        const bytes = utf8(seed);
        const text = put(bytes);
        const view = this.#view; // after all allocations, which may move the memory
        for (const [name, { at, type = "Float64" }] of NUMBERS) {
          const value = config[name];
          if (value !== undefined) view[`set${type}`](options + at, type === "BigInt64" ? BigInt(value) : value, true);
        }
        stops.forEach((at, i) => view.setUint32(stopList + 4 * i, at, true));
        view.setUint32(options + 72, stopList, true);
        view.setUint32(options + 76, stops.length, true);
        if (config.overflow) view.setInt32(options + 88, OVERFLOWS.indexOf(config.overflow), true);
        view.setInt32(options + 92, config.logprobs ? 1 : 0, true);
        strings.forEach((at, i) => view.setUint32(options + 96 + 4 * i, at, true));
        this.#check(context, this.#smallm.smallm_generate_start(context, text, bytes.length, options));
      });
    } catch (error) {
      this.free(context);
      throw error;
    }
    return context;
  }

  copy(context, rngSeed, streamNumber) {
    if (this.#smallm.smallm_context_copy(context, this.#result) !== 0) throw new Error(NO_MEMORY);
    const other = this.#pointer(this.#result);
    if (rngSeed !== undefined) this.#smallm.smallm_reseed(other, rngSeed, streamNumber);
    return other;
  }

  free(context) {
    this.#c?.smallm_context_free(context);
  }

  /** The next chunk of a text: computed for "next", or "" for "take" if none is certain; null at its end. */
  chunk(how, context) {
    const status = this.#smallm[`smallm_${how}`](context, this.#result, this.#result + 4);
    if (this.#check(context, status) === DONE) return null;
    return this.#text(this.#pointer(this.#result), this.#pointer(this.#result + 4));
  }

  /** ln of the probability of each character of the last chunk. */
  logprobs(context) {
    const at = this.#smallm.smallm_logprobs(context, this.#result) >>> 0;
    return new Float64Array(this.#smallm.memory.buffer, at, this.#pointer(this.#result));
  }

  /** Computes the next id of each text. */
  step(contexts) {
    this.#with((put) => {
      const list = put(4 * contexts.length);
      const view = this.#view;
      contexts.forEach((context, i) => view.setUint32(list + 4 * i, context, true));
      if (this.#smallm.smallm_step(list, contexts.length) <= DONE) return;
      const messages = contexts.map((context) => this.#string(this.#smallm.smallm_error(context)));
      throw new Error(messages.find(Boolean));
    });
  }

  nextCharacters(text, n) {
    return this.#measure("next_characters", text, 16 * n, n, (found, count) =>
      Array.from({ length: count }, (_, i) => ({
        character: this.#text(found + 16 * i, this.#bytes(found + 16 * i, 5).indexOf(0) || 1),
        probability: this.#view.getFloat64(found + 16 * i + 8, true),
      })),
    );
  }

  score(text) {
    const characters = Array.from(text).length;
    return this.#measure("score", text, 8 * characters, characters, (nats, count) =>
      new Float64Array(this.#smallm.memory.buffer, nats, count).slice(),
    );
  }

  #measure(name, text, room, capacity, read) {
    const context = this.#newContext();
    try {
      return this.#with((put) => {
        const bytes = utf8(text);
        const [found, at] = [put(room), put(bytes)];
        const call = this.#smallm[`smallm_${name}`];
        this.#check(context, call(context, at, bytes.length, found, capacity, this.#result));
        return read(found, this.#pointer(this.#result));
      });
    } finally {
      this.free(context);
    }
  }
}

const NUMBERS = Object.entries(OPTIONS).filter(([, option]) => option !== null);

/** The compiled module, given like a model, or compiled already. */
async function compile(wasm) {
  if (wasm instanceof WebAssembly.Module) return wasm;
  const [bytes] = await read(wasm, "WebAssembly module");
  try {
    return await WebAssembly.compile(bytes);
  } catch (error) {
    throw new Error(`cannot run smallm.wasm: ${error.message.split("\n")[0]}; WebAssembly with SIMD is needed`);
  }
}

/** Bytes and name of a file given as bytes, as a URL, or, outside of browsers, as a path. */
async function read(given, what) {
  const source = await given;
  if (source instanceof ArrayBuffer) return [new Uint8Array(source), `the ${what}`];
  if (ArrayBuffer.isView(source)) {
    return [new Uint8Array(source.buffer, source.byteOffset, source.byteLength), `the ${what}`];
  }
  if (typeof source !== "string" && !(source instanceof URL)) {
    throw new Error(`the ${what} is neither bytes nor a URL nor a path; pass the address of the file`);
  }
  const address = String(source);
  try {
    if (globalThis.process?.versions?.node && !/^(https?|data|blob):/.test(address)) {
      const fs = "node:fs/promises"; // in a variable, so that bundlers do not resolve it
      const path = address.startsWith("file:") ? new URL(address) : address;
      return [new Uint8Array(await (await import(fs)).readFile(path)), address.split(/[\\/]/).pop() || address];
    }
    const response = await fetch(source);
    if (!response.ok) throw new Error(`the server answers ${response.status} ${response.statusText}`.trim());
    return [new Uint8Array(await response.arrayBuffer()), address.split(/[\\/]/).pop() || address];
  } catch (error) {
    const reason = error.code === "ENOENT" ? "there is no such file" : error.message;
    throw new Error(`cannot read the ${what} ${address.slice(0, 200)}: ${reason}`);
  }
}

// -- options and texts

/** Checks the given options; those without a value are left out. */
function resolve(options, manifest) {
  const given = { rngSeed: crypto.getRandomValues(new Uint32Array(1))[0] };
  for (const [name, value] of Object.entries(options)) {
    if (!(name in OPTIONS)) throw new Error(`unknown option ${name}; use one of: ${Object.keys(OPTIONS).join(", ")}`);
    if (value !== undefined && value !== null) given[name] = value;
  }
  const { allowed, banned, stop = [], maxLength = 500, minLength = 0, overflow, signal } = given;
  for (const [name, option] of NUMBERS) {
    const limits = name === "repetitionWindow" ? { ...option, max: manifest.block_size } : option;
    if (name in given) check(name, given[name], { ...limits, rule: limits.rule.replace("{block_size}", manifest.block_size) });
  }
  if (minLength > maxLength) {
    throw new Error(`minLength = ${minLength} is more than maxLength = ${maxLength}; lower minLength`);
  }
  if (overflow !== undefined && !OVERFLOWS.includes(overflow)) {
    throw new Error(`overflow = ${overflow} is out of range; it must be "crop", "shift" or "slide"`);
  }
  if (overflow === "slide" && !manifest.window) {
    throw new Error('overflow = slide needs a model that was trained with model.window; use "crop" or "shift"');
  }
  if (signal !== undefined && typeof signal.throwIfAborted !== "function") {
    throw new Error("signal is not an AbortSignal; pass the signal of an AbortController");
  }
  for (const [name, text] of Object.entries({ allowed, banned })) if (text !== undefined) withoutNul(text, name);
  return { ...given, stops: [stop].flat().filter((word) => withoutNul(word, "stop") !== "") };
}

/** Throws if a number is out of range; the type "BigInt64" or "Uint32" wants a whole number. */
function check(name, value, { type = "Float64", min = 0, max = Number.MAX_SAFE_INTEGER, rule }) {
  const fits = typeof value === "number" && value >= min && value <= max && (type === "Float64" || Number.isInteger(value));
  if (!fits) throw new Error(`${name} = ${value} is out of range; it must be ${rule}`);
}

function withoutNul(text, name) {
  if (wellFormed(text, name).includes("\0")) throw new Error(`${name} contains the character U+0000; remove it`);
  return text;
}

function wellFormed(text, what) {
  if (typeof text !== "string") throw new Error(`${what} is not a string; pass a string`);
  const lone = text.search(/\p{Surrogate}/u);
  if (lone >= 0) {
    const code = text.charCodeAt(lone).toString(16).toUpperCase();
    throw new Error(`${what} has a lone surrogate (U+${code}), which UTF-8 cannot encode; remove it`);
  }
  return text;
}

function utf8(text) {
  return new TextEncoder().encode(text);
}

function kind(value) {
  return Array.isArray(value) || value === null ? "other" : typeof value;
}

// smallm.js: generates and scores text with a smallm model, in browsers and in Node.
//
//   import * as ort from "onnxruntime-web";                     // or "onnxruntime-node"
//   import { LanguageModel } from "./smallm.js";
//   const lm = await LanguageModel.load("model.onnx", { ort });
//   for await (const { text, surprisal } of lm.stream("Once", { maxLength: 200, rngSeed: 1 })) { … }
//
// The same fp32 model, seed text and rngSeed give the same text as smallm in Python, as long as the logits agree: wasm
// rounds differently in the seventh digit. smallm.d.ts documents every call. Shapes in comments: T time, V vocabulary.
// A mistake of the caller is an Error whose message is one sentence.

const FORMAT_VERSION = 1;
const MAX_THREADS = 1024;
const MAX_SMALL_CACHE = 64 * 2 ** 20; // bytes of KV cache that a file of any size may ask for
const MIN_PROBABILITY = 1e-6; // less likely first bytes of a character are not continued
const MIN_TEMPERATURE = 1e-200; // a lower temperature changes nothing, but a division could overflow
const CODE_POINTS = 0x110000;
const MIN_CODE = [0, 0, 0x80, 0x800, 0x10000]; // lowest code point whose UTF-8 has this number of bytes
const YIELD_AFTER = 16; // milliseconds after which the page may paint and handle input
const NOT_FINITE = "the model's logits are not finite: its weights are broken; train it again";
const OPTIONS = {
  maxLength: 500,
  temperature: undefined, // these four default to the values in the metadata
  topK: undefined,
  topP: undefined,
  minP: undefined,
  repetitionPenalty: 1,
  repetitionWindow: 0,
  allowed: undefined, // all characters
  banned: "",
  rngSeed: undefined,
  streamNumber: 0,
  stop: [],
  minLength: 0,
  overflow: undefined, // "slide" if the model has a window, else "shift"
};

export class LanguageModel {
  #session;
  #vocabulary;

  static async load(model, { ort, threads } = {}) {
    const runtime = ort?.InferenceSession ? ort : ort?.default;
    if (!runtime?.InferenceSession) {
      throw new Error("ONNX Runtime is missing; import onnxruntime-web or onnxruntime-node and pass it as { ort }");
    }
    const fits = threads === undefined || (isWhole(threads) && threads >= 1 && threads <= MAX_THREADS);
    check(fits, "threads", threads, `a whole number from 1 to ${MAX_THREADS}`);
    const [bytes, source] = await readModel(model);
    const manifest = readManifest(bytes, source);
    return new LanguageModel(await Session.open(runtime, bytes, manifest, source, threads));
  }

  /** Use `load`. */
  constructor(session) {
    this.#session = session;
    this.metadata = session.manifest;
    this.blockSize = session.manifest.block_size;
    this.vocabSize = session.manifest.vocab_size;
    this.#vocabulary = new Vocabulary(session.manifest.tokens);
  }

  async generate(seed = "", options = {}) {
    const texts = [seed];
    for await (const { text } of this.stream(seed, options)) texts.push(text);
    return texts.join("");
  }

  stream(seed = "", options = {}) {
    const config = resolve(this.metadata, options);
    return this.#write(new SequenceState(this.#vocabulary, this.#encodeSeed(seed), this.blockSize, config));
  }

  async *#write(state) {
    const cache = new KVCache(this.#session);
    let resumed = performance.now();
    for (;;) {
      while (state.ready.length > 0) yield state.ready.shift();
      if (state.done) return;
      if (performance.now() - resumed > YIELD_AFTER) {
        await yieldToPage();
        resumed = performance.now();
      }
      if (cache.length === this.blockSize && state.config.overflow === "slide") cache.slide();
      if (0 < cache.length && cache.length < this.blockSize) {
        state.choose(await cache.decode(state.history.slice(-1)));
      } else {
        const window = state.window(cache.length === 0);
        cache.reset();
        state.choose(await cache.decode(window));
      }
    }
  }

  async nextCharacters(text, n = 10) {
    check(isWhole(n) && n >= 0, "n", n, "a whole number, 0 or more");
    const after = await this.#continuations(this.#encodeSeed(text));
    const found = [];
    const paths = [{ probability: 1, ids: [] }]; // first ids of characters
    while (paths.length > 0 && found.length < n) {
      const likeliest = paths.reduce((best, path, i) => (path.probability > paths[best].probability ? i : best), 0);
      const [{ probability, ids }] = paths.splice(likeliest, 1);
      const character = this.#vocabulary.character(ids);
      if (character) {
        const encoded = this.#vocabulary.encode(character);
        if (encoded.length === ids.length && encoded.every((id, i) => id === ids[i])) {
          found.push({ character, probability }); // otherwise these bytes spell a character that has an id
        }
      } else if (ids.length < 4 && probability > MIN_PROBABILITY) {
        const [order, weights] = ranked(await after(ids));
        const total = weights.reduce((sum, w) => sum + w, 0);
        order.forEach((id, rank) => {
          const fits = beginsCharacter(id) === (ids.length === 0); // other ids cannot become a character
          if (fits) paths.push({ probability: (probability * weights[rank]) / total, ids: [...ids, id] });
        });
      }
    }
    return found;
  }

  /** For ids (T,): a function that returns the logits (V,) after these ids and further ones. */
  async #continuations(ids) {
    const cache = new KVCache(this.#session);
    const first = await cache.decode(ids);
    return (path) => {
      if (path.length === 0) return first;
      if (ids.length + path.length <= this.blockSize) return cache.copy().decode(path);
      return new KVCache(this.#session).decode([...ids, ...path].slice(-this.blockSize));
    };
  }

  async score(text) {
    const ids = this.#vocabulary.encode(wellFormed(text, "the text"));
    const nats = [];
    let logits, row; // of the window of blockSize ids in which this id is predicted, and of the id itself
    for (const [i, id] of ids.entries()) {
      if (i > 0) {
        const t = (i - 1) % this.blockSize;
        if (t === 0) ({ logits } = await this.#session.run(ids.slice(i - 1, i - 1 + this.blockSize)));
        row = logits.subarray(t * this.vocabSize, (t + 1) * this.vocabSize);
      }
      if (beginsCharacter(id)) nats.push(i > 0 ? surprisal(row, id) : NaN);
      else nats[nats.length - 1] += surprisal(row, id);
    }
    if (nats.some((x, i) => i > 0 && !Number.isFinite(x))) throw new Error(NOT_FINITE);
    return Float64Array.from(nats);
  }

  async release() {
    await this.#session.release();
  }

  #encodeSeed(seed) {
    wellFormed(seed, "the seed text");
    const tail = (seed || this.metadata.start_text).slice(-2 * this.blockSize); // 1 or 2 units a character
    return this.#vocabulary.encode(Array.from(tail).slice(-this.blockSize).join("")).slice(-this.blockSize);
  }
}

// -- the model

/** The wrapper of ONNX Runtime: the model as a function of ids and of the keys and values of the previous ids. */
class Session {
  static async open(ort, bytes, manifest, source, threads) {
    if (ort.env?.wasm) ort.env.wasm.numThreads = threads ?? ort.env.wasm.numThreads ?? 1;
    const options = { intraOpNumThreads: threads ?? 1, interOpNumThreads: 1, logSeverityLevel: 4 };
    let session;
    try {
      session = await ort.InferenceSession.create(bytes, options);
    } catch (error) {
      const needed = manifest.quality.onnxruntime;
      throw broken(source, error, needed ? ` or needs ONNX Runtime ${needed} or newer` : "");
    }
    const opened = new Session(ort, session, manifest, source);
    const expected = ["input_ids", "attention_mask", ...opened.past].sort().join();
    const found = session.inputNames.filter((name) => name !== "num_logits_to_keep").sort();
    if (found.join() !== expected || ["logits", ...opened.present].some((x) => !session.outputNames.includes(x))) {
      throw new Error(`${source}: inputs and outputs do not match its metadata; export the model again`);
    }
    return opened;
  }

  constructor(ort, session, manifest, source) {
    Object.assign(this, { ort, session, manifest, source });
    const parts = Array.from({ length: manifest.n_layer }, (_, i) => [`${i}.key`, `${i}.value`]).flat();
    this.past = parts.map((part) => `past_key_values.${part}`);
    this.present = parts.map((part) => `present.${part}`);
    this.ones = new BigInt64Array(manifest.block_size).fill(1n); // the mask of a full context
    const emptyPart = new ort.Tensor("float32", new Float32Array(0), [1, manifest.n_kv_head, 0, manifest.head_dim]);
    this.empty = parts.map(() => emptyPart);
    this.rotation = rotation(manifest.block_size - (manifest.window - 1), manifest);
  }

  /**
   * Computes the logits (T * V,) of ids (T,) after a cache of `length` ids; returns them and the extended cache.
   *
   * The returned cache is the input of the next pass: neither onnxruntime-web nor -node lets input and output share a
   * buffer without a copy, and copying whole buffers costs more than copying their used part. Neither accepts
   * `num_logits_to_keep`, an input with a default, so the logits of all positions are returned.
   */
  async run(ids, cache = this.empty, length = 0) {
    const { Tensor } = this.ort;
    const feeds = {
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
      attention_mask: new Tensor("int64", this.ones.subarray(0, length + ids.length), [1, length + ids.length]),
    };
    this.past.forEach((name, i) => (feeds[name] = cache[i]));
    let found;
    try {
      found = await this.session.run(feeds);
    } catch (error) {
      throw broken(this.source, error);
    }
    if (String(found.logits.dims) !== String([1, ids.length, this.manifest.vocab_size])) {
      throw broken(this.source, `the logits have the shape ${found.logits.dims}`);
    }
    return { logits: found.logits.data, cache: this.present.map((name) => found[name]) };
  }

  async release() {
    await this.session.release();
  }
}

function broken(source, error, otherwise = "") {
  const [line] = String(error?.message ?? error).trim().split("\n");
  return new Error(`${source} is broken${otherwise}, export the model again; ONNX Runtime says: ${line.slice(0, 200)}`);
}

/** The KV cache of one text, of at most blockSize ids. */
class KVCache {
  constructor(session, cache = session.empty, length = 0) {
    Object.assign(this, { session, cache, length });
  }

  /** Adds ids (T,), at least one; returns the logits (V,) after the last id. */
  async decode(ids) {
    const { logits, cache } = await this.session.run(ids, this.cache, this.length);
    this.cache = cache;
    this.length += ids.length;
    return logits.subarray(logits.length - this.session.manifest.vocab_size);
  }

  reset() {
    this.cache = this.session.empty;
    this.length = 0;
  }

  /**
   * Keeps the ids that the model's window still covers and drops the others. The kept keys are rotated back by the
   * number of positions that they move: RoPE attention depends on distances only (Su et al. 2021).
   */
  slide() {
    const { session, length } = this;
    const { n_kv_head: heads, head_dim: width, window } = session.manifest;
    const kept = window - 1;
    if (kept === 0) return this.reset();
    this.cache = this.cache.map((tensor, part) => {
      const rows = new Float32Array(heads * kept * width);
      for (let head = 0; head < heads; head++) {
        const end = (head + 1) * length * width;
        rows.set(tensor.data.subarray(end - kept * width, end), head * kept * width);
      }
      if (part % 2 === 0) rotateBack(rows, session.rotation); // even parts are keys, odd parts are values
      return new session.ort.Tensor("float32", rows, [1, heads, kept, width]);
    });
    this.length = kept;
  }

  copy() {
    return new KVCache(this.session, this.cache, this.length);
  }
}

/** Cosines and sines (head_dim / 2,), in single precision, that rotate a key by this number of positions. */
function rotation(positions, { head_dim, rope_theta }) {
  const half = head_dim / 2;
  const angles = Float64Array.from({ length: half }, (_, i) => positions * rope_theta ** (-i / half));
  return { cos: Float32Array.from(angles, Math.cos), sin: Float32Array.from(angles, Math.sin) };
}

/** Rotates keys (n * head_dim,) back in place; products and sums are rounded to single precision. */
function rotateBack(keys, { cos, sin }) {
  const half = cos.length;
  for (let start = 0; start < keys.length; start += 2 * half) {
    for (let i = 0; i < half; i++) {
      const low = keys[start + i];
      const high = keys[start + half + i];
      keys[start + i] = Math.fround(low * cos[i]) + Math.fround(high * sin[i]);
      keys[start + half + i] = Math.fround(high * cos[i]) - Math.fround(low * sin[i]);
    }
  }
}

/** Bytes and name of a model given as bytes, as a URL, or, in Node, as a path. */
async function readModel(model) {
  if (model instanceof ArrayBuffer) return [new Uint8Array(model), "the model"];
  if (ArrayBuffer.isView(model)) return [new Uint8Array(model.buffer, model.byteOffset, model.byteLength), "the model"];
  if (typeof model !== "string" && !(model instanceof URL)) {
    throw new Error("the model is neither bytes nor a URL nor a path; pass the address of an .onnx file");
  }
  const name = String(model).split(/[\\/]/).pop() || String(model);
  try {
    if (globalThis.process?.versions?.node && !/^(https?|data|blob):/.test(String(model))) {
      const fs = "node:fs/promises"; // in a variable, so that bundlers do not resolve it
      const path = String(model).startsWith("file:") ? new URL(model) : model;
      return [new Uint8Array(await (await import(fs)).readFile(path)), name];
    }
    const response = await fetch(model);
    if (!response.ok) throw new Error(`the server answers ${response.status} ${response.statusText}`.trim());
    return [new Uint8Array(await response.arrayBuffer()), name];
  } catch (error) {
    const reason = error.code === "ENOENT" ? "there is no such file" : error.message;
    throw new Error(`cannot read the model ${String(model)}: ${reason}`);
  }
}

// -- the manifest: the content of smallm.json, which is also in the file's metadata

/** The checked manifest in the bytes of an .onnx file. ONNX Runtime's JavaScript API does not return metadata. */
function readManifest(bytes, source) {
  let metadata, graph;
  try {
    [metadata, graph] = readMetadata(bytes);
  } catch (error) {
    throw new Error(`${source} is truncated or not an ONNX model (${error.message}); export the model again`);
  }
  const values = Object.entries(metadata).filter(([key]) => key.startsWith("smallm."));
  if (values.length === 0) throw new Error(`${source} is not a smallm model; write one with python export.py`);
  const brokenMetadata = new Error(`${source} has broken metadata; export the model again`);
  const manifest = { sampling: {}, training: {}, quality: {}, precision: "fp32", window: 0, rope_theta: 1e4, checksum: 0 };
  try {
    for (const [key, value] of values) manifest[key.slice("smallm.".length)] = JSON.parse(value);
  } catch {
    throw brokenMetadata;
  }
  if (manifest.format_version !== FORMAT_VERSION) {
    const version = JSON.stringify(manifest.format_version)?.slice(0, 40);
    throw new Error(`${source} has format version ${version}; this smallm.js reads ${FORMAT_VERSION}: ` +
      "export the model again, or take the smallm.js of the smallm that wrote it");
  }
  if (!isSane(manifest)) throw brokenMetadata;
  const m = manifest;
  if (m.checksum && m.checksum !== adler32(graph)) {
    throw new Error(`${source} is damaged: it does not match its checksum; copy it again, or export it again`);
  }
  const cache = 8 * m.n_layer * m.n_kv_head * m.head_dim * m.block_size; // bytes: keys and values, float32
  const minBytes = Math.max(Math.floor((m.vocab_size * m.n_embd) / 2), m.block_size * m.head_dim);
  if (minBytes > bytes.length || cache > MAX_SMALL_CACHE + 64 * bytes.length) {
    throw new Error(`${source} is too small for the sizes in its metadata; export the model again`);
  }
  return manifest;
}

function isSane(m) {
  const sizes = [m.block_size, m.n_layer, m.n_head, m.n_kv_head, m.n_embd, m.head_dim, m.vocab_size];
  if (!sizes.every((size) => isWhole(size) && size > 0 && size < 2 ** 24)) return false;
  const dictionaries = [m.sampling, m.training, m.quality];
  if (!dictionaries.every((x) => x !== null && typeof x === "object" && !Array.isArray(x))) return false;
  if (m.n_layer >= 1000 || m.n_head % m.n_kv_head !== 0 || m.head_dim % 2 !== 0) return false;
  if (!isWhole(m.checksum) || !isWithin(m.checksum, 0, 2 ** 32 - 1)) return false;
  if (!isWhole(m.window) || !isWithin(m.window, 0, m.block_size)) return false;
  if (!(isWithin(m.rope_theta, 0, 1e30) && 0 < m.rope_theta && m.rope_theta < 1e30)) return false;
  if ([m.tokens, m.start_text, m.precision].some((x) => typeof x !== "string")) return false;
  try {
    const vocabulary = new Vocabulary(m.tokens);
    const start = vocabulary.encode(wellFormed(m.start_text, "start_text"));
    const { temperature, topK } = resolve(m, {}).sampling;
    return vocabulary.size === m.vocab_size && 0 < start.length && start.length < 1000 &&
      temperature <= 2 ** 53 && topK <= 2 ** 53;
  } catch {
    return false;
  }
}

/** Adler-32 (RFC 1950). */
function adler32(bytes) {
  let [a, b] = [1, 0];
  for (let at = 0; at < bytes.length; a %= 65521, b %= 65521) {
    for (const end = Math.min(at + 5552, bytes.length); at < end; at++) b += a += bytes[at];
  }
  return b * 65536 + a;
}

/**
 * The `metadata_props` of an ONNX file, a protobuf message: field 14, repeated, each with a key and a value; and the
 * bytes of its graph, field 7.
 */
function readMetadata(bytes) {
  const metadata = Object.create(null);
  const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  let graph;
  for (const [number, value] of protobufFields(bytes)) {
    if (number === 7) graph = value;
    if (number !== 14) continue;
    const entry = new Map(protobufFields(value));
    const [key, text] = [1, 2].map((part) => utf8.decode(entry.get(part) ?? new Uint8Array(0)));
    if (key in metadata) throw new Error("its metadata have a key twice");
    metadata[key] = text;
  }
  if (!graph) throw new Error("it has no graph");
  return [metadata, graph];
}

/** Number and value of each field of a protobuf message; the value is undefined unless the field has a length. */
function* protobufFields(bytes) {
  if (!(bytes instanceof Uint8Array)) throw new Error("a field has the wrong type");
  for (let at = 0; at < bytes.length; ) {
    let key, length;
    [key, at] = varint(bytes, at);
    const type = key % 8;
    if (type === 0) [, at] = varint(bytes, at);
    else if (type === 2) [length, at] = varint(bytes, at);
    else if (type !== 1 && type !== 5) throw new Error(`wire type ${type}`);
    const size = type === 0 ? 0 : length ?? (type === 1 ? 8 : 4);
    if (size > bytes.length - at) throw new Error(`a field of ${size} bytes where ${bytes.length - at} are left`);
    yield [Math.floor(key / 8), type === 2 ? bytes.subarray(at, at + size) : undefined];
    at += size;
  }
}

/** Reads the varint at index `at`; returns the number, inexact beyond 2 ** 53, and the index after it. */
function varint(bytes, at) {
  let number = 0;
  for (let scale = 1; scale < 2 ** 70; scale *= 128) {
    if (at >= bytes.length) throw new Error("its end is missing");
    const byte = bytes[at++];
    number += (byte % 128) * scale;
    if (byte < 128) return [number, at];
  }
  throw new Error("a number of more than 64 bits");
}

// -- the vocabulary

/** Ids 0-255 are the bytes; ids from 256 up are `tokens`: the UTF-8 of non-ASCII characters, and prefixes of it. */
export class Vocabulary {
  #ids = new Map(); // hex -> id
  #bytes; // of each id

  /** tokens: in hex, separated by spaces, without repetition; a prefix comes right before its character. */
  constructor(tokens) {
    const hex = tokens.split(" ").filter(Boolean);
    if (!hex.every((token) => /^([0-9a-f]{2})+$/.test(token))) throw new Error("tokens are not hexadecimal");
    this.#bytes = [
      ...Array.from({ length: 256 }, (_, byte) => Uint8Array.of(byte)),
      ...hex.map((token) => Uint8Array.from(token.match(/../g), (byte) => parseInt(byte, 16))),
    ];
    hex.forEach((token, i) => {
      const prefixed = token.length === 4 || (token.length > 4 && this.#ids.has(token.slice(0, -2)));
      const begins = hex[i + 1]?.slice(0, -2) === token; // the token after it
      if (!prefixed || this.#ids.has(token) || !(begins || decodeCharacter(this.#bytes[256 + i]))) {
        throw new Error("tokens are not characters and their prefixes");
      }
      this.#ids.set(token, 256 + i);
    });
    this.size = this.#bytes.length;
  }

  /** Well-formed text -> ids. */
  encode(text) {
    const ids = [];
    for (const character of text) {
      const code = character.codePointAt(0);
      if (code < 128) ids.push(code);
      else ids.push(...this.#spell(new TextEncoder().encode(character)));
    }
    return ids;
  }

  /** The longest prefix that has an id (at best the whole character), then single bytes. */
  #spell(bytes) {
    const hex = Array.from(bytes, (byte) => byte.toString(16));
    for (let length = bytes.length; length > 1; length--) {
      const id = this.#ids.get(hex.slice(0, length).join(""));
      if (id !== undefined) return [id, ...bytes.subarray(length)];
    }
    return bytes;
  }

  bytes(id) {
    return this.#bytes[id];
  }

  /** The character that the ids spell, or "" if the ids do not spell exactly one character. */
  character(ids) {
    return decodeCharacter(Uint8Array.from(ids.flatMap((id) => [...this.#bytes[id]])));
  }
}

function decodeCharacter(bytes) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return Array.from(text).length === 1 ? text : "";
  } catch {
    return "";
  }
}

/** Whether an id begins a character: every id except the bytes 0x80-0xBF, which continue a UTF-8 sequence. */
function beginsCharacter(id) {
  return id < 0x80 || id >= 0xc0;
}

/** Returns the text if it is well-formed UTF-16; otherwise throws. */
function wellFormed(text, what) {
  if (typeof text !== "string") throw new Error(`${what} is not a string; pass a string`);
  const lone = text.search(/\p{Surrogate}/u);
  if (lone >= 0) {
    const code = text.charCodeAt(lone).toString(16).toUpperCase();
    throw new Error(`${what} has a lone surrogate (U+${code}), which UTF-8 cannot encode; remove it`);
  }
  return text;
}

// -- the state of one text

/** A streaming UTF-8 decoder. */
class Utf8 {
  /** pending: bytes of an incomplete character. */
  constructor(pending = []) {
    this.pending = pending;
  }

  /** Returns the characters that these bytes complete; U+FFFD for each truncated sequence and each invalid byte. */
  push(bytes) {
    const characters = [];
    for (const byte of bytes) {
      if (this.pending.length > 0 && !continues(this.pending, byte)) {
        characters.push("\ufffd");
        this.pending = [];
      }
      if (this.pending.length === 0 && sequenceLength(byte) === 0) {
        characters.push("\ufffd");
        continue;
      }
      this.pending = [...this.pending, byte];
      if (this.pending.length < sequenceLength(this.pending[0])) continue;
      characters.push(String.fromCodePoint(bitsOf(this.pending)));
      this.pending = [];
    }
    return characters;
  }
}

/** The length of the UTF-8 sequence that begins with this byte; 0 for an invalid first byte. */
function sequenceLength(lead) {
  if (lead < 0x80) return 1;
  return lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
}

/** Whether a byte may follow these bytes in a UTF-8 sequence: no overlong forms, no surrogates. */
function continues([lead, ...others], byte) {
  if (byte < 0x80 || byte > 0xbf) return false;
  if (others.length > 0) return true;
  if (lead === 0xe0) return byte >= 0xa0;
  if (lead === 0xed) return byte < 0xa0;
  if (lead === 0xf0) return byte >= 0x90;
  return lead !== 0xf4 || byte < 0x90;
}

/** The leading bits of a code point that the first bytes of its UTF-8 sequence hold. */
function bitsOf([lead, ...others]) {
  const first = lead < 0x80 ? lead : lead & (0x7f >> sequenceLength(lead));
  return others.reduce((bits, byte) => (bits << 6) | (byte & 0x3f), first);
}

/** Allowed characters as a filter of ids: SAMPLING.md, "Allowed characters". */
export class AllowedCharacters {
  #vocabulary;
  #characters = new Uint8Array(CODE_POINTS); // 1 = allowed
  #masks = new Map(); // bytes of an incomplete character -> for each id whether it may follow them

  constructor(vocabulary, allowed, banned) {
    this.#vocabulary = vocabulary;
    this.#characters.fill(allowed === undefined ? 1 : 0);
    for (const character of wellFormed(allowed ?? "", "allowed")) this.#characters[character.codePointAt(0)] = 1;
    for (const character of wellFormed(banned, "banned")) this.#characters[character.codePointAt(0)] = 0;
    this.#characters.fill(0, 0xd800, 0xe000); // surrogates are not characters
    if (!this.#characters.includes(1)) {
      throw new Error("allowed and banned leave no character; allow one that is not banned");
    }
  }

  /** For the bytes of an incomplete character: for each id (V,) whether it may follow them. */
  after(pending) {
    const key = pending.join();
    if (!this.#masks.has(key)) {
      const ids = Array.from({ length: this.#vocabulary.size }, (_, id) => id);
      this.#masks.set(key, ids.map((id) => this.#fits(pending, id)));
    }
    return this.#masks.get(key);
  }

  /** Logits (V,) with minus infinity for ids that are not allowed; NaN where such a logit was infinite. */
  only(logits, pending) {
    const mask = this.after(pending);
    return logits.map((logit, id) => (mask[id] ? logit : logit - Infinity));
  }

  #fits(pending, id) {
    const utf8 = new Utf8(pending);
    const completed = utf8.push(this.#vocabulary.bytes(id));
    return completed.every((c) => this.#characters[c.codePointAt(0)]) && this.#canBeCompleted(utf8.pending);
  }

  #canBeCompleted(pending) {
    if (pending.length === 0) return true;
    const length = sequenceLength(pending[0]);
    const ends = 64 ** (length - pending.length);
    const from = bitsOf(pending) * ends;
    return this.#characters.subarray(Math.max(from, MIN_CODE[length]), from + ends).includes(1);
  }
}

/** Chooses ids from logits, and releases the characters that can no longer be part of a stop string. */
class SequenceState {
  ready = []; // characters that are certain and were not taken yet
  #held = []; // characters after them that may be the beginning of a stop string
  #length = 0; // number of new characters
  #nats = 0; // surprisal of the ids of an incomplete character
  #utf8 = new Utf8();
  #allowed; // undefined = all characters are allowed

  constructor(vocabulary, ids, blockSize, config) {
    Object.assign(this, { vocabulary, history: ids, blockSize, config });
    const { allowed, banned } = config;
    if (allowed !== undefined || banned !== "") this.#allowed = new AllowedCharacters(vocabulary, allowed, banned);
    this.rng = new Rng(config.rngSeed, config.streamNumber);
    this.searches = config.stops.map((word) => new Search(word));
    this.done = config.maxLength === 0;
  }

  /** The ids (T,) to read when the cache is empty (the seed's ids) or full (the ids that `overflow` keeps). */
  window(fresh) {
    const whole = fresh || this.config.overflow === "crop";
    return this.history.slice(-(whole ? this.blockSize : Math.max(1, Math.floor(this.blockSize / 2))));
  }

  /** Chooses the next id. logits (V,): the model's logits after the text so far. */
  choose(logits) {
    const { repetitionPenalty, repetitionWindow, sampling } = this.config;
    const recent = repetitionPenalty === 1 ? [] : this.history.slice(-repetitionWindow);
    const possible = this.#allowed?.only(logits, this.#utf8.pending) ?? logits;
    const id = sample(applyRepetitionPenalty(possible, recent, repetitionPenalty), this.rng.uniform(), sampling);
    this.#nats += surprisal(logits, id);
    this.history.push(id);
    if (this.history.length > 2 * this.blockSize) this.history = this.history.slice(-this.blockSize);
    const characters = this.#utf8.push(this.vocabulary.bytes(id));
    if (characters.length > 0) this.#add(characters.slice(0, this.config.maxLength - this.#length));
  }

  #add(characters) {
    const last = characters.length - 1; // if an id completes several characters, the last one gets its surprisal
    characters.forEach((text, i) => {
      if (!this.done) this.#hold({ text, surprisal: i === last ? this.#nats : 0 });
    });
    this.#nats = 0;
    if (this.#length === this.config.maxLength) {
      this.done = true;
      this.ready.push(...this.#held.splice(0));
    }
  }

  /** Adds a character; releases the characters that cannot be part of a stop string, and ends the text before one. */
  #hold(chunk) {
    this.#held.push(chunk);
    const counts = this.#length++ >= this.config.minLength;
    const begun = counts ? this.searches.map((search) => search.push(chunk.text)) : [];
    const met = Math.max(0, ...begun.filter((length, i) => length === this.searches[i].word.length));
    this.ready.push(...this.#held.splice(0, this.#held.length - (met || Math.max(0, ...begun))));
    if (met) {
      this.#held = [];
      this.done = true;
    }
  }
}

/** The length of the longest prefix of a stop string that the text ends with (Knuth, Morris and Pratt 1977). */
class Search {
  #length = 0;
  #borders = [0]; // for each prefix of the word: length of its longest proper prefix that is also its suffix

  constructor(word) {
    this.word = Array.from(word);
  }

  /** Adds a character and returns the new length. Must not be called again once that is the length of the word. */
  push(character) {
    this.#length = this.#longer(this.#length, character);
    if (this.#length > this.#borders.length) this.#borders.push(this.#longer(this.#borders.at(-1), character));
    return this.#length;
  }

  #longer(length, character) {
    while (length > 0 && this.word[length] !== character) length = this.#borders[length - 1];
    return length + (this.word[length] === character ? 1 : 0);
  }
}

/** Lets the page paint and handle input; a timer would take four milliseconds. */
function yieldToPage() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(0);
  });
}

// -- the sampler: SAMPLING.md is the specification for all hosts

/** The id that u in [0, 1) selects from logits (V,). */
export function sample(logits, u, sampling) {
  const { temperature, minP = 0 } = sampling;
  const likeliest = argmax(logits);
  if (temperature === 0) return likeliest;
  const largest = logits[likeliest];
  const { least, count } = lastKept(logits, largest, sampling);
  const cumulative = new Float64Array(logits.length);
  let sum = 0;
  let left = count; // ids whose logit equals the lowest kept one and that may still be kept; lower ids first
  for (let id = 0; id < logits.length; id++) {
    const kept = logits[id] > least || (logits[id] === least && left-- > 0);
    const weight = kept ? weigh(logits[id], largest, temperature) : 0;
    sum += weight >= minP ? weight : 0;
    cumulative[id] = sum;
  }
  return cumulative.findIndex((upTo) => upTo > u * sum);
}

/** The index of the largest logit; of equal logits the first. */
function argmax(logits) {
  let likeliest = 0;
  for (let id = 0; id < logits.length; id++) {
    if (Number.isNaN(logits[id])) throw new Error(NOT_FINITE);
    if (logits[id] > logits[likeliest]) likeliest = id;
  }
  if (!Number.isFinite(logits[likeliest])) throw new Error(NOT_FINITE);
  return likeliest;
}

/** The lowest logit that top-k and top-p keep, and how many of the ids with this logit are kept. */
function lastKept(logits, largest, { temperature, topK = 0, topP = 1 }) {
  if (topP === 1 && (topK === 0 || topK >= logits.length)) return { least: -Infinity, count: logits.length };
  let descending = logits.slice().sort().reverse().subarray(0, topK || logits.length);
  if (topP < 1) {
    const weights = Float64Array.from(descending, (logit) => weigh(logit, largest, temperature));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    let sum = 0;
    descending = descending.subarray(0, weights.findIndex((weight) => (sum += weight) >= topP * total) + 1);
  }
  const least = descending.at(-1);
  return { least, count: descending.length - descending.indexOf(least) };
}

function weigh(logit, largest, temperature) {
  return Math.exp((logit - largest) / Math.max(temperature, MIN_TEMPERATURE));
}

/** All ids by descending logit (V,), of equal logits the lower id first, and their weights at temperature 1. */
function ranked(logits) {
  const largest = logits[argmax(logits)];
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
  return [order, order.map((id) => weigh(logits[id], largest, 1))];
}

/** The repetition penalty: logits (V,) in which each of the ids, counted once, is less likely; single precision. */
export function applyRepetitionPenalty(logits, ids, penalty) {
  if (ids.length === 0) return logits;
  const changed = logits.slice();
  const factor = Math.fround(penalty);
  for (const id of ids) changed[id] = logits[id] > 0 ? logits[id] / factor : logits[id] * factor;
  return changed;
}

/** Surprisal of an id in nats: minus ln of its probability at temperature 1, from logits (V,). */
function surprisal(logits, id) {
  let largest = -Infinity;
  for (const x of logits) if (!(x <= largest)) largest = x; // keeps NaN
  let sum = 0;
  for (const x of logits) sum += Math.exp(x - largest);
  return Math.log(sum) - (logits[id] - largest);
}

/** Random numbers: draw i = 1, 2, … is x = mix(key + i * 0x9E3779B9) of 32 bits, and u = (x >>> 8) / 2 ** 24. */
export class Rng {
  #key;
  #draws = 0;

  constructor(seed, stream = 0) {
    for (const [name, value] of Object.entries({ rngSeed: seed, streamNumber: stream })) {
      check(isWhole(value) && value >= 0 && value < 2 ** 32, name, value, "a whole number from 0 to 4294967295");
    }
    this.#key = mix(mix(seed) + stream);
  }

  /** The next u in [0, 1). */
  uniform() {
    this.#draws = (this.#draws + 1) >>> 0;
    return (mix(this.#key + Math.imul(this.#draws, 0x9e3779b9)) >>> 8) / 2 ** 24;
  }
}

/** lowbias32 of x modulo 2 ** 32, a bijection. */
export function mix(x) {
  x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
  x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
  return (x ^ (x >>> 16)) >>> 0;
}

// -- options

/** Checks the given options and adds the default of each missing one. */
function resolve(manifest, options) {
  for (const name of Object.keys(options)) {
    if (!(name in OPTIONS)) throw new Error(`unknown option ${name}; use one of: ${Object.keys(OPTIONS).join(", ")}`);
  }
  const given = Object.entries(options).filter(([, value]) => value !== undefined && value !== null);
  const o = { ...OPTIONS, ...Object.fromEntries(given) };
  const defaults = manifest.sampling;
  const sampling = {
    temperature: o.temperature ?? defaults.temperature ?? 0.8,
    topK: o.topK ?? defaults.top_k ?? 0,
    topP: o.topP ?? defaults.top_p ?? 1,
    minP: o.minP ?? defaults.min_p ?? 0,
  };
  const { temperature, topK, topP, minP } = sampling;
  const rngSeed = o.rngSeed ?? crypto.getRandomValues(new Uint32Array(1))[0];
  new Rng(rngSeed, o.streamNumber); // checks both
  const isTemperature = isWithin(temperature, 0, Number.MAX_VALUE);
  check(isTemperature, "temperature", temperature, "0 or more (0 = the likeliest character)");
  check(isWhole(topK) && topK >= 0, "topK", topK, "a whole number, 0 or more (0 = all ids)");
  check(isWithin(topP, 0, 1) && topP > 0, "topP", topP, "above 0 and at most 1 (1 = all ids)");
  check(isWithin(minP, 0, 1), "minP", minP, "from 0 to 1 (0 = all ids)");
  const penalty = o.repetitionPenalty;
  check(isWithin(penalty, 0.01, 100), "repetitionPenalty", penalty, "from 0.01 to 100 (1 = off)");
  const size = manifest.block_size;
  const fits = isWhole(o.repetitionWindow) && o.repetitionWindow >= 0 && o.repetitionWindow <= size;
  check(fits, "repetitionWindow", o.repetitionWindow, `from 0 to block_size = ${size} (0 = block_size)`);
  for (const name of ["maxLength", "minLength"]) {
    check(isWhole(o[name]) && o[name] >= 0, name, o[name], "a whole number from 0 to 9007199254740991");
  }
  if (o.minLength > o.maxLength) {
    throw new Error(`minLength = ${o.minLength} is more than maxLength = ${o.maxLength}; lower minLength`);
  }
  const overflow = o.overflow ?? (manifest.window ? "slide" : "shift");
  check(["crop", "shift", "slide"].includes(overflow), "overflow", overflow, '"crop", "shift" or "slide"');
  if (overflow === "slide" && !manifest.window) {
    throw new Error('overflow = slide needs a model that was trained with model.window; use "crop" or "shift"');
  }
  const stops = [o.stop].flat().filter((word) => wellFormed(word, "stop") !== "");
  return { ...o, sampling, stops, rngSeed, overflow, repetitionWindow: o.repetitionWindow || size };
}

function isWhole(value) {
  return Number.isSafeInteger(value);
}

function isWithin(value, min, max) {
  return typeof value === "number" && value >= min && value <= max;
}

function check(condition, name, value, rule) {
  if (!condition) throw new Error(`${name} = ${value} is out of range; it must be ${rule}`);
}

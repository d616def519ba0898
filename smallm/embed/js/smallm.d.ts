/** What this module needs of onnxruntime-web or onnxruntime-node, version 1.21 or newer. */
export interface OnnxRuntime {
  InferenceSession: { create(bytes: Uint8Array, options?: object): Promise<any> };
  Tensor: new (...parts: any[]) => any;
}

export interface LoadOptions {
  /** `import * as ort from "onnxruntime-web"`, or from "onnxruntime-node". */
  ort: OnnxRuntime | { default: OnnxRuntime };
  /** Threads that compute, from 1 to 1024; default 1. On a page, more than 1 needs cross-origin isolation. */
  threads?: number;
}

/** What is left out or undefined takes the default; a value out of range, or another name, is an `Error`. */
export interface GenerateOptions {
  /** Most characters (code points) after the seed; default 500. */
  maxLength?: number;
  /** 0 = always the likeliest; default: the model's own, as for the next three. */
  temperature?: number;
  /** Choose from the k likeliest ids; 0 = all. */
  topK?: number;
  /** Choose from the likeliest ids that make up this probability; above 0, at most 1 = all. */
  topP?: number;
  /** Least probability, relative to the likeliest id; from 0 to 1. */
  minP?: number;
  /** Above 1: ids that came up lately become less likely, below 1 likelier; from 0.01 to 100, default 1 = off. */
  repetitionPenalty?: number;
  /** How many of the last ids the penalty looks at, at most blockSize; default 0 = blockSize. */
  repetitionWindow?: number;
  /** The only characters that may be written; default: all. One spelled in several ids is a character like any other. */
  allowed?: string;
  /** Characters that are not written; default: none. It is an `Error` if none is left to write. */
  banned?: string;
  /** From 0 to 4294967295: equal rngSeed and streamNumber give equal text; default: a random one. */
  rngSeed?: number;
  /** Tells several texts of one rngSeed apart; from 0 to 4294967295, default 0. */
  streamNumber?: number;
  /** Generation ends before the first of these texts; only new text counts. */
  stop?: string | readonly string[];
  /** A stop that begins within so many new characters is text like any other; default 0. */
  minLength?: number;
  /**
   * Past blockSize ids, "crop" computes the last blockSize ids anew for each id, which is exact; "shift" goes on with
   * the newest half of them whenever they are full, which is faster; "slide", only for models trained with
   * model.window, is both. Default: "slide" for those, else "crop".
   */
  overflow?: "crop" | "shift" | "slide";
}

/** A character as it comes. */
export interface Piece {
  /** One whole character (code point). */
  text: string;
  /** In nats: minus ln of its probability at temperature 1, the sum over its ids. */
  surprise: number;
}

/** What the model says about itself, as in smallm.json. */
export interface Manifest {
  format_version: 1;
  block_size: number;
  n_layer: number;
  n_head: number;
  n_kv_head: number;
  n_embd: number;
  head_dim: number;
  vocab_size: number;
  /** Positions that attention sees, its own included; 0 = the whole context. */
  window: number;
  /** Base of the rotary positions. */
  rope_theta: number;
  /** Ids from 256 up in hexadecimal UTF-8. */
  tokens: string;
  /** What an empty seed stands for. */
  start_text: string;
  /** Default temperature, top_k, top_p, min_p. */
  sampling: Record<string, number>;
  training: Record<string, unknown>;
  precision: string;
  quality: Record<string, unknown>;
}

/**
 * A character-level language model. Texts may be written side by side; each has a cache of its own.
 *
 * Every seed must be well formed: a lone surrogate is an `Error`. An empty one stands for `metadata.start_text`.
 */
export class LanguageModel {
  private constructor();

  /** Opens a model given as the bytes of its .onnx file, as a URL or, in Node, as a path. */
  static load(model: string | URL | ArrayBuffer | ArrayBufferView, options: LoadOptions): Promise<LanguageModel>;

  readonly metadata: Readonly<Manifest>;
  /** Longest context, in ids. */
  readonly blockSize: number;
  readonly vocabSize: number;

  /** The seed text followed by new characters. */
  generate(seed?: string, options?: GenerateOptions): Promise<string>;

  /** The new characters as they come; nothing is computed before it is asked for. Throws for a value out of range. */
  stream(seed?: string, options?: GenerateOptions): AsyncGenerator<Piece, void, undefined>;

  /**
   * The n likeliest next characters at temperature 1, the likeliest first; default 10. One that is spelled in several
   * ids may be missing if it is less likely than 1e-6.
   */
  nextCharacters(text: string, n?: number): Promise<{ character: string; probability: number }[]>;

  /** Nats of each character (code point); the first is NaN, since nothing comes before it. */
  score(text: string): Promise<Float64Array>;

  /** Gives the memory back; nothing else may be called afterwards. */
  release(): Promise<void>;
}

/** The random numbers that every smallm host draws. */
export class Rng {
  constructor(seed: number, stream?: number);
  /** The next number in [0, 1), a multiple of 2 ** -24. */
  uniform(): number;
}

/** The step of `Rng`: a bijection of the 32-bit numbers. */
export function mix(x: number): number;

/** The ids of a model and what they spell. */
export class Vocabulary {
  /** tokens: `metadata.tokens`. */
  constructor(tokens: string);
  readonly size: number;
  /** Ids of a well-formed text. */
  encode(text: string): number[];
  /** UTF-8 that an id stands for, of a whole character or a part of one. */
  bytes(id: number): Uint8Array;
}

/** Which ids may come next, so that only permitted characters get written. */
export class Permitted {
  /** allowed: undefined = all characters. An `Error` if none is left. */
  constructor(vocabulary: Vocabulary, allowed: string | undefined, banned: string);
  /** Bytes of a character that is not whole yet -> for each id whether it may come after them. */
  after(pending: readonly number[]): boolean[];
}

/** logits (vocabSize,) and u in [0, 1) -> the id taken. Options as in `GenerateOptions`, defaults: all ids. */
export function sample(
  logits: Float32Array,
  u: number,
  sampling: { temperature: number; topK?: number; topP?: number; minP?: number },
): number;

/** Logits in which those of the ids are less likely; the same array if there are no ids. */
export function penalise(logits: Float32Array, ids: readonly number[], penalty: number): Float32Array;

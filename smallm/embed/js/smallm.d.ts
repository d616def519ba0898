/** A file: its bytes, its URL or, outside of browsers, its path. */
export type Source = string | URL | ArrayBuffer | ArrayBufferView;

export interface LoadOptions {
  /** smallm.wasm, or the compiled module; default: the file beside smallm.js. */
  wasm?: Source | WebAssembly.Module;
}

/** A missing or undefined option has its default; a value out of range or an unknown name is an `Error`. */
export interface GenerateOptions {
  /** Maximum number of new characters (code points); default 500. */
  maxLength?: number;
  /** Sampling temperature; 0 = always the likeliest id. The default of this and the next three is in the metadata. */
  temperature?: number;
  /** Sample from the k likeliest ids; 0 = all. */
  topK?: number;
  /** Sample from the likeliest ids whose probabilities add up to this; above 0, at most 1 = all. */
  topP?: number;
  /** Minimum probability relative to the likeliest id; from 0 to 1. */
  minP?: number;
  /** Above 1 recent ids become less likely, below 1 likelier; from 0.01 to 100, default 1 = off. */
  repetitionPenalty?: number;
  /** Number of last ids that the penalty applies to, at most blockSize; default 0 = blockSize. */
  repetitionWindow?: number;
  /** The only characters that may be generated, whatever ids spell them; default: all. */
  allowed?: string;
  /** Characters that are never generated; default: none. An `Error` if no character is left. */
  banned?: string;
  /** From 0 to 4294967295: equal rngSeed and streamNumber give equal text; default: a random one. */
  rngSeed?: number;
  /** Distinguishes texts of the same rngSeed; from 0 to 4294967295, default 0. */
  streamNumber?: number;
  /** Stop strings, without U+0000: generation ends before the first of them in the new text. */
  stop?: string | readonly string[];
  /** Stop strings that begin within this number of new characters are ignored; default 0. */
  minLength?: number;
  /**
   * What happens beyond blockSize ids. "crop" recomputes the last blockSize ids for each new id, which is exact and slow.
   * "shift" keeps the newest half whenever the context is full, which is fast. "slide", only for models trained with
   * model.window, is exact and fast. Default: "slide" for models with a window, otherwise "shift".
   */
  overflow?: "crop" | "shift" | "slide";
  /** Ends the call with the signal's reason as error, within about 16 milliseconds; `stream` has then yielded the text so far. */
  signal?: AbortSignal;
}

/** One generated character. */
export interface Piece {
  /** One whole character (code point). */
  text: string;
  /** Surprisal in nats: minus ln of the probability at temperature 1, summed over the ids of the character. */
  surprisal: number;
}

/** The manifest of a model, as in smallm.json. */
export interface Manifest {
  format_version: 1;
  block_size: number;
  n_layer: number;
  n_head: number;
  n_kv_head: number;
  n_embd: number;
  head_dim: number;
  vocab_size: number;
  /** Number of positions that attention covers, the current one included; 0 = the whole context. */
  window: number;
  /** Base of RoPE. */
  rope_theta: number;
  /** UTF-8 of the ids from 256 up, in hexadecimal, separated by spaces. */
  tokens: string;
  /** The text that an empty seed stands for. */
  start_text: string;
  /** Default temperature, top_k, top_p, min_p. */
  sampling: Record<string, number>;
  training: Record<string, unknown>;
  precision: string;
  quality: Record<string, unknown>;
  /** Adler-32 of the graph in the ONNX file, weights included; 0 = unknown. */
  checksum: number;
}

/**
 * A character-level language model. Several texts may be generated at the same time; each has its own KV cache.
 *
 * A seed must be well-formed UTF-16: a lone surrogate is an `Error`. An empty seed stands for `metadata.start_text`.
 */
export class LanguageModel {
  private constructor();

  /** Opens a model.onnx, or a promise of one. Each call loads its own copy of the model, with its own memory. */
  static load(model: Source | PromiseLike<Source>, options?: LoadOptions): Promise<LanguageModel>;

  readonly metadata: Readonly<Manifest>;
  /** Longest context, in ids. */
  readonly blockSize: number;
  readonly vocabSize: number;

  /** Returns the seed text followed by new characters. */
  generate(seed?: string, options?: GenerateOptions): Promise<string>;

  /**
   * For each seed text, this text followed by new characters. Text i equals that of `generate` with streamNumber + i; the
   * texts are computed together, 32 at a time.
   */
  generateMany(seeds: Iterable<string>, options?: GenerateOptions): Promise<string[]>;

  /**
   * Yields new characters; each is computed when it is requested. Throws at once for a value out of range. Every 16
   * milliseconds the event loop gets a turn; to keep a page free of longer tasks, use the module in a worker.
   */
  stream(seed?: string, options?: GenerateOptions): TextStream;

  /**
   * The n likeliest next characters at temperature 1, the likeliest first; default 10. A character of several ids may be
   * missing if its probability is below 1e-6.
   */
  nextCharacters(text: string, n?: number): Promise<{ character: string; probability: number }[]>;

  /** Surprisal of each character (code point) in nats; NaN for the first, which has no context. Blocks until it is done. */
  score(text: string): Promise<Float64Array>;

  /** How well the model predicts a text of at least two characters. Blocks until it is done. */
  perplexity(text: string): Promise<Perplexity>;

  /** Frees the memory; no other method may be called afterwards. */
  release(): Promise<void>;
}

/** The characters of a text. A `for await` loop that is left ends the stream. */
export interface TextStream extends AsyncIterableIterator<Piece> {
  return(value?: any): Promise<IteratorResult<Piece>>;
  /**
   * A new stream that continues from here independently, without computing the text so far again. Without rngSeed it
   * yields the same text as this stream.
   */
  branch(random?: { rngSeed?: number; streamNumber?: number }): TextStream;
}

/** The loss of a model on a text, per character. */
export interface Perplexity {
  natsPerChar: number;
  bitsPerChar: number;
  perplexity: number;
  /** Number of predicted characters: all but the first. */
  characters: number;
}

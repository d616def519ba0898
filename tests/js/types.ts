// Checked by tsc, never run: what the types allow and what they refuse.
import { LanguageModel, type GenerateOptions, type Perplexity, type Piece, type TextStream } from "./smallm.js";

const lm = await LanguageModel.load("model.onnx");
await LanguageModel.load(new Uint8Array(3), { wasm: new URL("smallm.wasm", "http://localhost/") });
const options: GenerateOptions = { temperature: 0.8, topK: 40, stop: ["\n"], overflow: "shift", banned: "é" };
const text: string = await lm.generate("The ", options);
for await (const piece of lm.stream(text)) {
  const { text, surprisal }: Piece = piece;
  text.padEnd(surprisal);
}
const nats: Float64Array = await lm.score(text);
const [{ character, probability }] = await lm.nextCharacters("The ", 1);
const branch: TextStream = lm.stream("a", { signal: AbortSignal.timeout(9) }).branch({ rngSeed: 3 });
const loss: Perplexity = await lm.perplexity((await lm.generateMany(["a", "b"])).join(""));
character.padEnd(loss.bitsPerChar + probability + nats.length + lm.blockSize + lm.metadata.vocab_size);
await branch.return();

// @ts-expect-error: no number
await LanguageModel.load(5);
// @ts-expect-error: the name in Python
await lm.generate("The ", { top_k: 40 });
// @ts-expect-error: not a number
lm.stream("The ", { temperature: "hot" });
// @ts-expect-error: cannot be changed
lm.blockSize = 3;

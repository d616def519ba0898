// Checked by tsc, never run: what the types allow and what they refuse.
import * as node from "onnxruntime-node";
import * as web from "onnxruntime-web";
import { LanguageModel, AllowedCharacters, Vocabulary, type GenerateOptions, type Piece } from "./smallm.js";

const lm = await LanguageModel.load("model.onnx", { ort: node, threads: 2 });
await LanguageModel.load(new Uint8Array(3), { ort: web });
const options: GenerateOptions = { temperature: 0.8, topK: 40, stop: ["\n"], overflow: "shift", banned: "é" };
const text: string = await lm.generate("The ", options);
for await (const piece of lm.stream(text)) {
  const { text, surprisal }: Piece = piece;
  text.padEnd(surprisal);
}
const nats: Float64Array = await lm.score(text);
const [{ character, probability }] = await lm.nextCharacters("The ", 1);
const after: boolean[] = new AllowedCharacters(new Vocabulary(lm.metadata.tokens), undefined, "é").after([0xc3]);
character.padEnd(after.length + probability + nats.length + lm.blockSize + lm.metadata.vocab_size);

// @ts-expect-error: ONNX Runtime has to be passed in
await LanguageModel.load("model.onnx");
// @ts-expect-error: the name in Python
await lm.generate("The ", { top_k: 40 });
// @ts-expect-error: not a number
lm.stream("The ", { temperature: "hot" });
// @ts-expect-error: cannot be changed
lm.blockSize = 3;

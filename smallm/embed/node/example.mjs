// Writes 500 characters after the seed text: node example.mjs "The " [rngSeed]
import { LanguageModel } from "./smallm.js";

process.on("uncaughtException", ({ message }) => {
  console.error(message);
  process.exit(1);
});
const [seed = "", rngSeed] = process.argv.slice(2);
const lm = await LanguageModel.load(new URL("model.onnx", import.meta.url));
process.stdout.write(seed);
for await (const { text } of lm.stream(seed, { maxLength: 500, rngSeed: rngSeed && Number(rngSeed) })) {
  process.stdout.write(text);
}
console.log();

// Opens an export folder with transformers.js as its card says, and writes greedily.
// node transformers.mjs FOLDER SEED NEW -> one line of JSON: {"text": ...}, or {"error": ...} and exit code 1
import { env, pipeline } from "@huggingface/transformers";

env.allowRemoteModels = false;
const [folder, seed, count] = process.argv.slice(2);
try {
  const generator = await pipeline("text-generation", folder);
  const [{ generated_text: text }] = await generator(seed, { max_new_tokens: Number(count), do_sample: false });
  console.log(JSON.stringify({ text, ids: generator.tokenizer(seed).input_ids.tolist()[0].map(Number) }));
} catch (error) {
  console.log(JSON.stringify({ error: String(error.message ?? error) }));
  process.exitCode = 1;
}

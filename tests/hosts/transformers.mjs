// Opens an export folder with transformers.js as its card says, and writes greedily after one or several seeds.
// node transformers.mjs FOLDER NEW SEED… -> one line of JSON: {"texts": …, "ids": of the first seed}, or {"error": …} and exit code 1
import { env, pipeline } from "@huggingface/transformers";

env.allowRemoteModels = false;
const [folder, count, ...seeds] = process.argv.slice(2);
try {
  const generator = await pipeline("text-generation", folder);
  const written = await generator(seeds, { max_new_tokens: Number(count), do_sample: false });
  const texts = written.map(([{ generated_text }]) => generated_text);
  console.log(JSON.stringify({ texts, ids: generator.tokenizer(seeds[0]).input_ids.tolist()[0].map(Number) }));
} catch (error) {
  console.log(JSON.stringify({ error: String(error.message ?? error) }));
  process.exitCode = 1;
}

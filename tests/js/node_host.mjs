// node node_host.mjs SMALLM_JS RUNTIME MODEL CALLS.json: the answers as JSON. RUNTIME: a package of ONNX Runtime.
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
import { answer } from "./answer.mjs";

const [module, runtime, model, calls] = process.argv.slice(2);
const { LanguageModel } = await import(pathToFileURL(module));
const ort = await import(runtime);
console.log(JSON.stringify(await answer(LanguageModel, ort, model, JSON.parse(await readFile(calls, "utf8")))));

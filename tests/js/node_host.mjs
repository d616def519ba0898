// node node_host.mjs SMALLM_JS MODEL CALLS.json OPTIONS: the answers as JSON. OPTIONS of `load`, as JSON.
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
import { answer } from "./answer.mjs";

const [module, model, calls, options] = process.argv.slice(2);
const { LanguageModel } = await import(pathToFileURL(module));
const asked = JSON.parse(await readFile(calls, "utf8"));
console.log(JSON.stringify(await answer(LanguageModel, model, asked, JSON.parse(options))));

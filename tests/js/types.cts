// Checked by tsc, never run: the types for require().
import { LanguageModel, type GenerateOptions } from "smallm-model";

const options: GenerateOptions = { maxLength: 5 };
LanguageModel.load("model.onnx").then((lm) => lm.generate("The ", options).then((text: string) => text.length));

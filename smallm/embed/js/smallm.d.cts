export type * from "./smallm.js" with { "resolution-mode": "import" };
type Module = typeof import("./smallm.js", { with: { "resolution-mode": "import" } });
export declare const LanguageModel: Pick<Module["LanguageModel"], "load">;

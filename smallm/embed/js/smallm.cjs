// For require(): loads smallm.js when a model is loaded.
exports.LanguageModel = { load: async (...given) => (await import("./smallm.js")).LanguageModel.load(...given) };

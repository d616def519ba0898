// Generates text with an exported model through ONNX Runtime's C++ API, without any code of smallm.
//
//   c++ -std=c++17 -O2 generate.cpp -o generate $(pkg-config --cflags --libs libonnxruntime)
//   ./generate model.onnx "Once upon a time" 300
//
// The model reads ids and returns the logits of the next id. The vocabulary is in the metadata of the file: ids 0 to 255 are
// bytes, ids from 256 up are the UTF-8 bytes that `smallm.tokens` lists in hexadecimal, separated by spaces. A text longer
// than the context ends here; docs/generation.md describes how to continue.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

using Ids = std::vector<int64_t>;

struct Vocabulary {
    std::vector<std::string> bytes;     // id -> bytes
    std::map<std::string, int64_t> ids; // bytes -> id
};

// One value of the metadata. Each is JSON; the values that we need are numbers, or strings without escapes.
static std::string metadata(const Ort::Session &session, const char *name) {
    Ort::AllocatorWithDefaultOptions allocator;
    auto value = session.GetModelMetadata().LookupCustomMetadataMapAllocated(name, allocator);
    std::string text = value ? value.get() : "";
    return text.size() >= 2 && text[0] == '"' ? text.substr(1, text.size() - 2) : text;
}

static Vocabulary read_vocabulary(const std::string &tokens) {
    Vocabulary vocabulary;
    for (int byte = 0; byte < 256; byte++) vocabulary.bytes.push_back(std::string(1, (char)byte));
    std::istringstream words(tokens);
    for (std::string hex; words >> hex;) {
        std::string bytes;
        for (size_t i = 0; i + 1 < hex.size(); i += 2) bytes += (char)std::stoi(hex.substr(i, 2), nullptr, 16);
        vocabulary.bytes.push_back(bytes);
    }
    for (size_t id = 0; id < vocabulary.bytes.size(); id++) vocabulary.ids[vocabulary.bytes[id]] = (int64_t)id;
    return vocabulary;
}

// A character with an id of its own becomes that id. Of any other character, the longest known prefix becomes an id, then
// the next longest, down to single bytes.
static Ids encode(const Vocabulary &vocabulary, const std::string &text) {
    Ids ids;
    for (size_t start = 0; start < text.size();) {
        size_t end = start + 1; // one character of UTF-8
        while (end < text.size() && ((unsigned char)text[end] & 0xC0) == 0x80) end++;
        while (start < end) {
            size_t length = end - start;
            while (!vocabulary.ids.count(text.substr(start, length))) length--;
            ids.push_back(vocabulary.ids.at(text.substr(start, length)));
            start += length;
        }
    }
    return ids;
}

// Draws an id from the top_k most probable ones.
static int64_t sample(std::vector<float> logits, float temperature, size_t top_k, std::mt19937 &random) {
    std::vector<float> sorted = logits;
    size_t k = std::min(top_k ? top_k : sorted.size(), sorted.size());
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    float least = sorted[k - 1], largest = *std::max_element(logits.begin(), logits.end());
    std::vector<double> weights;
    for (float logit : logits) weights.push_back(logit < least ? 0 : std::exp((double)(logit - largest) / temperature));
    return std::discrete_distribution<int64_t>(weights.begin(), weights.end())(random);
}

static int run(const char *path, const std::string &seed, int max_length) {
    Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "generate");
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    Ort::Session session(env, path, options);
    Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

    int64_t n_layer = std::stoll(metadata(session, "smallm.n_layer"));
    int64_t n_kv_head = std::stoll(metadata(session, "smallm.n_kv_head"));
    int64_t head_dim = std::stoll(metadata(session, "smallm.head_dim"));
    int64_t block_size = std::stoll(metadata(session, "smallm.block_size"));
    Vocabulary vocabulary = read_vocabulary(metadata(session, "smallm.tokens"));
    int64_t vocab_size = (int64_t)vocabulary.bytes.size();

    std::vector<std::string> input_names = {"input_ids", "attention_mask"}, output_names = {"logits"};
    for (int64_t layer = 0; layer < n_layer; layer++)
        for (const char *kind : {"key", "value"}) {
            input_names.push_back("past_key_values." + std::to_string(layer) + "." + kind);
            output_names.push_back("present." + std::to_string(layer) + "." + kind);
        }
    std::vector<const char *> inputs, outputs;
    for (const std::string &name : input_names) inputs.push_back(name.c_str());
    for (const std::string &name : output_names) outputs.push_back(name.c_str());

    // The KV cache starts empty: (batch, n_kv_head, length 0, head_dim). Each pass returns the cache with the new ids.
    float nothing = 0;
    const int64_t empty[] = {1, n_kv_head, 0, head_dim};
    std::vector<Ort::Value> cache;
    for (int64_t i = 0; i < 2 * n_layer; i++)
        cache.push_back(Ort::Value::CreateTensor<float>(memory, &nothing, 0, empty, 4));

    std::mt19937 random(1);
    Ids ids = encode(vocabulary, seed.empty() ? "\n" : seed);
    std::fputs(seed.c_str(), stdout);
    int64_t length = 0; // ids in the cache
    for (int i = 0; i < max_length && length + (int64_t)ids.size() <= block_size; i++) {
        length += (int64_t)ids.size();
        Ids mask((size_t)length, 1);
        const int64_t ids_shape[] = {1, (int64_t)ids.size()}, mask_shape[] = {1, length};
        std::vector<Ort::Value> values;
        values.push_back(Ort::Value::CreateTensor<int64_t>(memory, ids.data(), ids.size(), ids_shape, 2));
        values.push_back(Ort::Value::CreateTensor<int64_t>(memory, mask.data(), mask.size(), mask_shape, 2));
        std::move(cache.begin(), cache.end(), std::back_inserter(values));
        std::vector<Ort::Value> found = session.Run(Ort::RunOptions{nullptr}, inputs.data(), values.data(), values.size(),
                                                    outputs.data(), outputs.size());
        const float *last = found[0].GetTensorData<float>() + (int64_t)(ids.size() - 1) * vocab_size; // (1, T, V)
        int64_t id = sample(std::vector<float>(last, last + vocab_size), 0.8f, 40, random);
        std::fwrite(vocabulary.bytes[(size_t)id].data(), 1, vocabulary.bytes[(size_t)id].size(), stdout);
        std::fflush(stdout);
        cache.assign(std::make_move_iterator(found.begin() + 1), std::make_move_iterator(found.end()));
        ids = {id};
    }
    std::puts("");
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: generate MODEL.onnx SEED [MAX_LENGTH]\n");
        return 2;
    }
    try {
        return run(argv[1], argv[2], argc > 3 ? std::atoi(argv[3]) : 300);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "generate: %s\n", error.what());
        return 2;
    }
}

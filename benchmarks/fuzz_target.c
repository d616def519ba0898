/* The target of libFuzzer that fuzz_c.py builds: opens a model, and a draft table that may follow it in the file, then
   generates and scores a few characters. */

#include "smallm.c" /* not smallm.h: the library reads draft tables only from files of their own */

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t room);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_PART = 64 };
#define NOT_GUIDED __attribute__((no_sanitize("coverage"))) /* the loops over the file, which took half of the time */

/* Three of four mutations keep the size of the file: the lengths of the messages around a change stay right, so that the
   reader gets further. Half of them change the first or the last 6,000 bytes, where the nodes, the metadata and the draft
   table are. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed)
{
    uint8_t part[MAX_PART];
    size_t length = 1 + seed / 16 % MAX_PART, edge = 6000, at = seed / 1024;
    if (seed % 4 == 0 || size <= MAX_PART) return LLVMFuzzerMutate(data, size, room);
    if (edge > size - length) edge = size - length;
    at = seed / 4 % 2 == 0 ? at % (size - length + 1) : seed / 8 % 2 == 0 ? at % (edge + 1) : size - length - at % (edge + 1);
    memcpy(part, data + at, length);
    LLVMFuzzerMutate(part, length, length);
    memcpy(data + at, part, length);
    return size;
}

/* Returns the offset of the last numpy signature, with which the draft table starts, or `size` without a signature. */
static NOT_GUIDED size_t find_table(const uint8_t *data, size_t size)
{
    for (size_t at = size; at-- > 0;)
        if (size - at >= 7 && data[at] == 0x93 && memcmp(data + at, "\x93NUMPY\x01", 7) == 0) return at;
    return size;
}

/* Generates a text; of some files one half of it together with a copy. */
static void generate(smallm_context *context, bool together)
{
    smallm_context *both[2] = {context, NULL};
    const char *text;
    size_t bytes;
    for (int i = 0; together && i < 3; i++) smallm_next(context, &text, &bytes);
    if (together && smallm_context_copy(context, &both[1]) == SMALLM_OK) {
        smallm_reseed(both[1], 1, 2);
        while (smallm_step(both, 2) == SMALLM_OK)
            for (int i = 0; i < 2; i++) smallm_take(both[i], &text, &bytes);
    }
    smallm_context_free(both[1]);
    while (smallm_next(context, &text, &bytes) == SMALLM_OK) {}
}

/* A number that depends on the file (FNV-1a) and chooses kernels and options. */
static NOT_GUIDED uint32_t hash(const uint8_t *data, size_t size)
{
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < size; i += 5) h = (h ^ data[i]) * 16777619u;
    return h;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const stops[] = {"e", "\xC3\xA9 "}, *const names[] = {NULL, "avx2", "sse2", "plain"};
    uint32_t choice = hash(data, size);
    smallm_open_options how = {sizeof how, names[choice % 4], 1};
    smallm_model *model = NULL;
    smallm_context *context = NULL;
    smallm_options options;
    smallm_character likeliest[4];
    double nats[8];
    size_t bytes, end = find_table(data, size);
    smallm_status status = smallm_open_memory(data, end, &how, &model);
    if (status == SMALLM_OK && end < size) read_draft_table(model, span_of(data + end, size - end));
    if (status == SMALLM_OK && smallm_context_new(model, &context) == SMALLM_OK) {
        smallm_default_options(model, &options, sizeof options);
        options.max_length = 12, options.rng_seed = choice, options.logprobs = 1;
        if (choice % 8 < 4) options.stops = stops, options.stop_count = 2, options.banned = "a\xC3\xA9";
        if (choice % 16 < 8) options.repetition_penalty = 1.5, options.overflow = SMALLM_CROP;
        smallm_generate_start(context, "a\xC3\xA9", choice % 32 < 8 ? 0 : 3, &options);
        generate(context, choice / 32 % 4 == 0);
        smallm_score(context, "an \xC3\xA9.", 6, nats, 8, &bytes);
        if (choice / 128 % 32 == 0) smallm_next_characters(context, "an", 2, likeliest, 4, &bytes); /* many passes */
    }
    smallm_context_free(context);
    smallm_close(model);
    return 0;
}

/* The test program of tests/embed/test_kit_c.py: calls internal functions of smallm.c and calls that main.c never makes. */

#include <stdlib.h>

static size_t allocations; /* so far */

static void *counted_calloc(size_t count, size_t size)
{
    allocations++;
    return calloc(count, size);
}

static void *counted_realloc(void *old, size_t size)
{
    allocations++;
    return realloc(old, size);
}

#define calloc counted_calloc
#define realloc counted_realloc
#include "smallm.c"
#undef calloc
#undef realloc

#include <pthread.h>

static int print_draws(char **argv)
{
    uint32_t key = rng_key((uint32_t)strtoul(argv[0], NULL, 10), (uint32_t)strtoul(argv[1], NULL, 10));
    for (uint32_t i = 1; i <= 5; i++) printf("%lu\n", (unsigned long)draw(key, i));
    return 0;
}

/* Twelve ids by the golden logits: multiples of 2^-21 from -4 to 4. */
static int print_ids(char **argv)
{
    enum { V = 256, WINDOW = 8 };
    smallm model;
    smallm_options options;
    static float logits[V], processed[V];
    static uint64_t keys[V], order[V], spare[V];
    static double weights[V];
    int64_t ids[12];
    memset(&model, 0, sizeof model);
    model.vocab_size = V, model.processed = processed, model.weights = weights;
    model.keys = keys, model.order = order, model.spare = spare;
    smallm_default_options(NULL, &options, sizeof options);
    options.temperature = strtod(argv[0], NULL), options.top_k = strtol(argv[1], NULL, 10);
    options.top_p = strtod(argv[2], NULL), options.min_p = strtod(argv[3], NULL);
    model.state.key = rng_key(7, 0);
    for (size_t step = 0; step < 12; step++) {
        size_t seen = step < WINDOW ? step : WINDOW;
        for (uint32_t id = 0; id < V; id++)
            logits[id] = (float)((mix(256 * (uint32_t)(step % 3) + id) >> 8) / 2097152.0 - 4);
        apply_repetition_penalty(&model, logits, ids + step - seen, seen, strtod(argv[4], NULL));
        ids[step] = sample(&model, uniform(&model.state), &options);
        printf("%ld\n", (long)ids[step]);
    }
    return 0;
}

/* For each line of "temperature top_k top_p min_p u logit logit ..." the id that is taken. */
static int print_samples(void)
{
    enum { MAX_IDS = 64 };
    smallm model;
    smallm_options options;
    float processed[MAX_IDS];
    uint64_t keys[MAX_IDS], order[MAX_IDS], spare[MAX_IDS];
    double weights[MAX_IDS], u;
    long long top_k;
    memset(&model, 0, sizeof model);
    model.processed = processed, model.weights = weights;
    model.keys = keys, model.order = order, model.spare = spare;
    smallm_default_options(NULL, &options, sizeof options);
    while (scanf("%d %lf %lld %lf %lf %lf", &model.vocab_size, &options.temperature, &top_k, &options.top_p,
                 &options.min_p, &u) == 6) {
        options.top_k = top_k;
        for (int i = 0; i < model.vocab_size && i < MAX_IDS; i++)
            if (scanf("%f", &processed[i]) != 1) return 1;
        printf("%ld\n", (long)sample(&model, u, &options));
    }
    return 0;
}

/* Each argument as a number of JSON. */
static int print_numbers(char **argv)
{
    for (; *argv != NULL; argv++) {
        span json = span_of(*argv, strlen(*argv));
        double value;
        bool whole;
        if (json_number(&json, &value, &whole) && at_end(&json)) printf("%.17g\n", value);
        else printf("none\n");
    }
    return 0;
}

/* The ids that may come after the bytes (hexadecimal) of a character, of a vocabulary: tokens allowed|- banned bytes. */
static int print_allowed(char **argv)
{
    static token tokens[64];
    static bool allowed[256 + 64];
    smallm model;
    memset(&model, 0, sizeof model);
    model.tokens = tokens;
    if (!read_tokens(span_of(argv[0], strlen(argv[0])), tokens, &model.token_count)) return 1;
    model.vocab_size = 256 + (int32_t)model.token_count;
    model.state.options.allowed = strcmp(argv[1], "-") == 0 ? NULL : argv[1];
    model.state.options.banned = argv[2];
    if (prepare_allowed(&model, &model.state) != SMALLM_OK) return 1;
    free(model.state.allowed);
    model.state.allowed = allowed;
    for (const char *hex = argv[3]; *hex; hex += 2)
        model.state.decoder.bytes[model.state.decoder.length++] =
            (uint8_t)(hex_digit((uint8_t)hex[0]) << 4 | hex_digit((uint8_t)hex[1]));
    find_allowed(&model, &model.state);
    for (int id = 0; id < model.vocab_size; id++)
        if (allowed[id]) printf("%d\n", id);
    free(model.state.characters);
    return 0;
}

/* The text of the bytes from stdin, without what is left pending. */
static int print_decoded(void)
{
    pending decoder = {{0}, 0};
    char text[MAX_PUSHED];
    for (int c; (c = getchar()) != EOF;) fwrite(text, 1, push_byte(&decoder, (uint8_t)c, text), stdout);
    return 0;
}

/* The chunks of a text in hexadecimal, one per line, then what they cost in allocations. */
static int print_chunks(char **argv)
{
    smallm *model;
    smallm_options options;
    const char *stops[] = {argv[3], argv[4]}, *text;
    size_t bytes, before;
    smallm_status status = smallm_open(argv[0], NULL, &model);
    smallm_default_options(model, &options, sizeof options);
    options.max_length = atoi(argv[2]), options.rng_seed = 3, options.temperature = 1, options.top_k = 0;
    options.min_length = atoi(argv[5]), options.overflow = atoi(argv[8]);
    options.banned = argv[9];
    options.stops = stops, options.stop_count = 2;
    options.repetition_penalty = strtod(argv[6], NULL), options.repetition_window = atoi(argv[7]);
    if (status == SMALLM_OK) status = smallm_generate_start(model, argv[1], strlen(argv[1]), &options);
    before = allocations;
    while (status == SMALLM_OK && (status = smallm_next(model, &text, &bytes)) == SMALLM_OK) {
        for (size_t i = 0; i < bytes; i++) printf("%02x", (unsigned char)text[i]);
        printf("\n");
    }
    printf("%d %lu %s\n", (int)status, (unsigned long)(allocations - before), smallm_error(model));
    smallm_close(model);
    return 0;
}

/* The nats of each character of stdin, in the middle of another text, which must not mind. */
static int print_score(char **argv)
{
    static char text[1 << 16];
    static double found[1 << 16];
    smallm *model;
    const char *chunk;
    size_t bytes = fread(text, 1, sizeof text, stdin), count = 0, length;
    if (smallm_open(argv[0], NULL, &model) != SMALLM_OK) return 1;
    if (smallm_generate_start(model, "the ", 4, NULL) != SMALLM_OK) return 1;
    for (int i = 0; i < 20; i++) {
        if (smallm_next(model, &chunk, &length) != SMALLM_OK) return 1;
        fwrite(chunk, 1, length, stdout);
        if (i == 5 && smallm_score(model, text, bytes, found, 1 << 16, &count) != SMALLM_OK) return 1;
    }
    printf("\x1e");
    for (size_t i = 0; i < count; i++) printf("%.9g\n", found[i]);
    smallm_close(model);
    return 0;
}

/* The call comes first: it may set the handle. */
#define SAY(what, call, model)                                                      \
    do {                                                                            \
        smallm_status status_ = (call);                                             \
        printf("%s: %d %s\n", what, (int)status_, smallm_error(model));             \
    } while (0)

static smallm_status start_with(smallm *model, smallm_options options)
{
    return smallm_generate_start(model, "a", 1, &options);
}

/* Every mistake that the interface allows. */
static int make_mistakes(char **argv)
{
    smallm *model = NULL;
    smallm_options options;
    smallm_open_options opening = {sizeof opening, -1};
    const char *text, *stops[] = {"\xff", NULL};
    size_t bytes, count;
    double nats[4];
    SAY("no place for the handle", smallm_open(argv[0], NULL, NULL), NULL);
    SAY("no path", smallm_open(NULL, NULL, &model), model);
    SAY("next of a model that is not open", smallm_next(model, &text, &bytes), model);
    smallm_close(model);
    SAY("no data", smallm_open_memory(NULL, 10, NULL, &model), model);
    smallm_close(model);
    SAY("empty data", smallm_open_memory("", 0, NULL, &model), model);
    smallm_close(model);
    SAY("threads", smallm_open(argv[0], &opening, &model), model);
    smallm_close(model);
    opening.size = 1;
    SAY("open options without size", smallm_open(argv[0], &opening, &model), model);
    smallm_close(model);
    opening.size = sizeof opening.size;
    SAY("open options of the past", smallm_open(argv[0], &opening, &model), model);
    smallm_close(model);
    struct { smallm_open_options known; int64_t unknown; } later = {{sizeof later, 1}, 0};
    SAY("open options of the future", smallm_open(argv[0], &later.known, &model), model);
    smallm_close(model);
    later.unknown = 1;
    SAY("an open option of the future", smallm_open(argv[0], &later.known, &model), model);
    smallm_close(model);
    smallm_close(NULL);
    SAY("no handle", smallm_next(NULL, &text, &bytes), NULL);
    if (smallm_open(argv[0], NULL, &model) != SMALLM_OK) return 1;
    SAY("next before start", smallm_next(model, &text, &bytes), model);
    SAY("a seed that is NULL", smallm_generate_start(model, NULL, 3, NULL), model);
    SAY("a seed that is not UTF-8", smallm_generate_start(model, "ab\xc3", 3, NULL), model);
    SAY("a surrogate", smallm_generate_start(model, "\xed\xa0\x80", 3, NULL), model);
    memset(&options, 0, sizeof options);
    SAY("options without size", start_with(model, options), model);
#define WITH(change)                                           \
    smallm_default_options(model, &options, sizeof options);   \
    options.change;                                            \
    SAY(#change, start_with(model, options), model)
    WITH(temperature = -1);
    WITH(temperature = NAN);
    WITH(temperature = INFINITY);
    WITH(top_k = -1);
    WITH(top_p = 0);
    WITH(top_p = 1.5);
    WITH(min_p = -0.1);
    WITH(repetition_penalty = 0);
    WITH(repetition_penalty = NAN);
    WITH(repetition_window = 1 << 20);
    WITH(max_length = -1);
    WITH(min_length = 501);
    WITH(overflow = SMALLM_SLIDE);
    WITH(overflow = 3);
    WITH(allowed = "");
    WITH(allowed = "\xff");
    WITH(banned = "a\xc3");
    options.allowed = "aé", options.banned = "éa";
    SAY("allowed and banned alike", start_with(model, options), model);
    WITH(stop_count = 1);
    options.stops = stops + 1;
    SAY("a stop that is NULL", start_with(model, options), model);
    options.stops = stops;
    SAY("a stop that is not UTF-8", start_with(model, options), model);
    SAY("next after a start that failed", smallm_next(model, &text, &bytes), model);
    struct { smallm_options known; int64_t unknown; } newer;
    memset(&newer, 0, sizeof newer);
    smallm_default_options(model, &newer.known, sizeof newer);
    SAY("options of the future", smallm_generate_start(model, "a", 1, &newer.known), model);
    newer.unknown = 1;
    SAY("an option of the future", smallm_generate_start(model, "a", 1, &newer.known), model);
    WITH(max_length = INT64_MAX);
    options.size = offsetof(smallm_options, top_k);
    options.top_k = -5;
    SAY("options of the past", start_with(model, options), model);
    for (int i = 0; i < 100; i++)
        if (smallm_next(model, &text, &bytes) != SMALLM_OK) return 1;
    SAY("next without a place", smallm_next(model, NULL, NULL), model);
    SAY("next again", smallm_next(model, &text, &bytes), model);
    SAY("start with the last chunk", smallm_generate_start(model, text, bytes, NULL), model);
    if (smallm_next(model, &text, &bytes) != SMALLM_OK) return 1;
    WITH(allowed = text);
    SAY("next of one character", smallm_next(model, &text, &bytes), model);
    WITH(max_length = 0);
    SAY("next of nothing", smallm_next(model, &text, &bytes), model);
    SAY("next of nothing, again", smallm_next(model, &text, &bytes), model);
    SAY("score without a place", smallm_score(model, "abc", 3, NULL, 0, &count), model);
    printf("%lu\n", (unsigned long)count);
    SAY("score with too little room", smallm_score(model, "abc", 3, nats, 2, &count), model);
    SAY("score of no UTF-8", smallm_score(model, "\x80", 1, nats, 4, &count), model);
    SAY("score of nothing", smallm_score(model, NULL, 0, nats, 4, &count), model);
    SAY("score without a count", smallm_score(model, "abc", 3, nats, 4, NULL), model);
    smallm_close(model);
    return 0;
}

/* The size of a tensor of 2^30 elements of 8 bytes does not depend on size_t. */
static int print_tensor_bytes(void)
{
    static const uint8_t tensor[] = {0x08, 0x80, 0x80, 0x80, 0x80, 0x04, 0x10, 0x07}; /* dims 2^30, type int64 */
    printf("%.0f %zu\n", (double)tensor_bytes(span_of(tensor, sizeof tensor)), sizeof(tensor_bytes(span_of("", 0))));
    return 0;
}

static void *write_text(void *path)
{
    smallm *model;
    const char *chunk;
    size_t bytes;
    char *text = calloc(1, 4096);
    if (smallm_open(path, NULL, &model) == SMALLM_OK && smallm_generate_start(model, "the ", 4, NULL) == SMALLM_OK)
        while (smallm_next(model, &chunk, &bytes) == SMALLM_OK) strcat(text, chunk);
    smallm_close(model);
    return text;
}

/* The same text from several threads, each with its own handle. */
static int print_threads(char **argv)
{
    pthread_t threads[3];
    void *text;
    for (int i = 0; i < 3; i++)
        if (pthread_create(&threads[i], NULL, write_text, argv[0]) != 0) return 1;
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], &text);
        printf("%s\x1e", (char *)text);
        free(text);
    }
    return 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "draws") == 0) return print_draws(argv + 2);
    if (strcmp(what, "ids") == 0) return print_ids(argv + 2);
    if (strcmp(what, "samples") == 0) return print_samples();
    if (strcmp(what, "numbers") == 0) return print_numbers(argv + 2);
    if (strcmp(what, "allowed") == 0) return print_allowed(argv + 2);
    if (strcmp(what, "decode") == 0) return print_decoded();
    if (strcmp(what, "chunks") == 0) return print_chunks(argv + 2);
    if (strcmp(what, "score") == 0) return print_score(argv + 2);
    if (strcmp(what, "mistakes") == 0) return make_mistakes(argv + 2);
    if (strcmp(what, "tensor-bytes") == 0) return print_tensor_bytes();
    if (strcmp(what, "threads") == 0) return print_threads(argv + 2);
    return 2;
}

/* The test program of tests/embed/test_kit_c.py: calls internal functions of smallm.c and calls that main.c never makes. */

#include <stdlib.h>

static size_t allocations; /* so far */

static void *counted_calloc(size_t count, size_t size)
{
    __atomic_fetch_add(&allocations, 1, __ATOMIC_RELAXED);
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
#include <sched.h>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#else
#include <sys/wait.h>
#include <unistd.h>
#endif

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
    smallm_model model;
    smallm_context context;
    smallm_options options;
    static float logits[V], processed[V];
    static uint64_t keys[V], order[V], spare[V];
    static double weights[V];
    int32_t ids[12];
    memset(&model, 0, sizeof model);
    memset(&context, 0, sizeof context);
    model.vocab_size = V, context.model = &model, context.processed = processed, context.weights = weights;
    context.sort_keys = keys, context.order = order, context.spare = spare;
    smallm_default_options(NULL, &options, sizeof options);
    options.temperature = strtod(argv[0], NULL), options.top_k = strtol(argv[1], NULL, 10);
    options.top_p = strtod(argv[2], NULL), options.min_p = strtod(argv[3], NULL);
    context.state.key = rng_key(7, 0);
    for (size_t step = 0; step < 12; step++) {
        size_t seen = step < WINDOW ? step : WINDOW;
        for (uint32_t id = 0; id < V; id++)
            logits[id] = (float)((mix(256 * (uint32_t)(step % 3) + id) >> 8) / 2097152.0 - 4);
        apply_repetition_penalty(&context, logits, ids + step - seen, seen, strtod(argv[4], NULL));
        ids[step] = sample(&context, u_of(context.state.key, ++context.state.draws), &options);
        printf("%ld\n", (long)ids[step]);
    }
    return 0;
}

/* For each line of "temperature top_k top_p min_p u logit logit ..." the id that is taken. */
static int print_samples(void)
{
    enum { MAX_IDS = 64 };
    smallm_model model;
    smallm_context context;
    smallm_options options;
    float processed[MAX_IDS];
    uint64_t keys[MAX_IDS], order[MAX_IDS], spare[MAX_IDS];
    double weights[MAX_IDS], u;
    long long top_k;
    memset(&model, 0, sizeof model);
    memset(&context, 0, sizeof context);
    context.model = &model, context.processed = processed, context.weights = weights;
    context.sort_keys = keys, context.order = order, context.spare = spare;
    smallm_default_options(NULL, &options, sizeof options);
    while (scanf("%d %lf %lld %lf %lf %lf", &model.vocab_size, &options.temperature, &top_k, &options.top_p,
                 &options.min_p, &u) == 6) {
        options.top_k = top_k;
        for (int i = 0; i < model.vocab_size && i < MAX_IDS; i++)
            if (scanf("%f", &processed[i]) != 1) return 1;
        printf("%ld\n", (long)sample(&context, u, &options));
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
    smallm_model model;
    smallm_context context;
    sequence_state *d = &context.state;
    memset(&model, 0, sizeof model);
    memset(&context, 0, sizeof context);
    model.tokens = tokens, context.model = &model;
    if (!read_tokens(span_of(argv[0], strlen(argv[0])), tokens, &model.token_count)) return 1;
    model.vocab_size = 256 + (int32_t)model.token_count;
    d->options.allowed = strcmp(argv[1], "-") == 0 ? NULL : argv[1];
    d->options.banned = argv[2];
    if (prepare_allowed(&context, d) != SMALLM_OK) return 1;
    free(d->allowed);
    d->allowed = allowed;
    for (const char *hex = argv[3]; *hex; hex += 2)
        d->decoder.bytes[d->decoder.length++] = (uint8_t)(hex_digit((uint8_t)hex[0]) << 4 | hex_digit((uint8_t)hex[1]));
    find_allowed(&model, d);
    for (int id = 0; id < model.vocab_size; id++)
        if (allowed[id]) printf("%d\n", id);
    free(d->characters);
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

/* Opens a model and a context, or ends the program with the message. */
static smallm_context *open_context(const char *path, const char *kernels, size_t threads)
{
    smallm_open_options options = {sizeof options, kernels, threads};
    smallm_model *model;
    smallm_context *context;
    if (smallm_open(path, &options, &model) != SMALLM_OK || smallm_context_new(model, &context) != SMALLM_OK) {
        fprintf(stderr, "%s\n", smallm_model_error(model));
        exit(1);
    }
    return context;
}

static void close_context(smallm_context *context)
{
    smallm_model *model = (smallm_model *)context->model;
    smallm_context_free(context);
    smallm_close(model);
}

static void print_hex(const char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) printf("%02x", (unsigned char)text[i]);
}

/* The chunks of a text in hexadecimal and their logprobs, one per line, then what they cost in allocations. */
static int print_chunks(char **argv)
{
    smallm_context *context = open_context(argv[0], NULL, 1);
    smallm_options options;
    const char *stops[] = {argv[3], argv[4]}, *text;
    size_t bytes, before;
    smallm_default_options(context->model, &options, sizeof options);
    options.max_length = atoi(argv[2]), options.rng_seed = 3, options.temperature = 1, options.top_k = 0;
    options.min_length = atoi(argv[5]), options.overflow = atoi(argv[8]);
    options.banned = argv[9], options.logprobs = 1;
    options.stops = stops, options.stop_count = 2;
    options.repetition_penalty = strtod(argv[6], NULL), options.repetition_window = atoi(argv[7]);
    smallm_status status = smallm_generate_start(context, argv[1], strlen(argv[1]), &options);
    before = allocations;
    while (status == SMALLM_OK && (status = smallm_next(context, &text, &bytes)) == SMALLM_OK) {
        print_hex(text, bytes);
        printf(" %.9g\n", smallm_logprob(context));
        size_t count;
        const double *each = smallm_logprobs(context, &count);
        double sum = 0;
        for (size_t i = 0; i < count; i++) sum += each[i];
        if (count == 0 || sum != smallm_logprob(context)) return 1;
    }
    printf("%d %lu %s\n", (int)status, (unsigned long)(allocations - before), smallm_error(context));
    close_context(context);
    return 0;
}

/* The nats of each character of stdin, in the middle of another text, which must not change. */
static int print_score(char **argv)
{
    static char text[1 << 16];
    static double found[1 << 16];
    smallm_context *context = open_context(argv[0], NULL, 1);
    smallm_character next[4];
    const char *chunk;
    size_t bytes = fread(text, 1, sizeof text, stdin), count = 0, length;
    if (smallm_generate_start(context, "the ", 4, NULL) != SMALLM_OK) return 1;
    for (int i = 0; i < 20; i++) {
        if (smallm_next(context, &chunk, &length) != SMALLM_OK) return 1;
        fwrite(chunk, 1, length, stdout);
        if (i == 5 && smallm_score(context, text, bytes, found, 1 << 16, &count) != SMALLM_OK) return 1;
        if (i == 7 && smallm_next_characters(context, text, 9, next, 4, &length) != SMALLM_OK) return 1;
    }
    printf("\x1e");
    for (size_t i = 0; i < count; i++) printf("%.9g\n", found[i]);
    close_context(context);
    return 0;
}

/* The logits of the ids on stdin as hexadecimal bits, computed with the given kernels and so many ids in a pass. */
static int print_logits(char **argv)
{
    static int32_t ids[4096];
    smallm_context *context = open_context(argv[0], argv[1], (size_t)atoi(argv[3]));
    size_t count = 0, per_pass = (size_t)atoi(argv[2]), V = (size_t)context->model->vocab_size;
    for (int id; count < 4096 && scanf("%d", &id) == 1;) ids[count++] = id;
    for (size_t at = 0; at < count; at += per_pass) {
        segment s = {context, ids + at, count - at < per_pass ? count - at : per_pass, at};
        forward(context, &s, 1, true, true);
        for (size_t r = 0; r < s.count; r++) {
            for (size_t i = 0; i < V; i++) {
                uint32_t bits;
                memcpy(&bits, context->logits + r * context->model->padded_vocab + i, sizeof bits);
                printf("%08lx ", (unsigned long)bits);
            }
            printf("\n");
        }
    }
    close_context(context);
    return 0;
}

/* Attention of one query in 8 bits: the bits of its result, for a query and then keys and values from stdin. */
static int print_attention(char **argv)
{
    smallm_context *context = open_context(argv[0], argv[1], 1);
    const smallm_model *m = context->model;
    size_t width = (size_t)m->head_dim, count = (size_t)atoi(argv[2]);
    float query[64], key[64], value[64], y[64];
    buffers b = buffers_of(context, 0);
    cache8 k = cache8_of(m, context, 0, 0);
    if (m->ones == NULL || width > 64) return 1;
    for (size_t i = 0; i < width; i++) if (scanf("%f", &query[i]) != 1) return 1;
    for (size_t at = 0; at < count; at++) {
        for (size_t i = 0; i < width; i++) if (scanf("%f", &key[i]) != 1) return 1;
        for (size_t i = 0; i < width; i++) if (scanf("%f", &value[i]) != 1) return 1;
        store8(m, &k, &b, value, key, at); /* codes that the next line replaces */
        store8(m, &k, &b, key, value, at);
    }
    attend(m, context, &b, 0, 0, query, width, 1, count - 1, 0, y, width);
    for (size_t i = 0; i < width; i++) {
        uint32_t bits;
        memcpy(&bits, &y[i], sizeof bits);
        printf("%08lx ", (unsigned long)bits);
    }
    close_context(context);
    return 0;
}

/* The next characters after a text and their probabilities. */
static int print_next(char **argv)
{
    smallm_context *context = open_context(argv[0], NULL, 1);
    smallm_character found[300];
    size_t count;
    if (smallm_next_characters(context, argv[1], strlen(argv[1]), found, (size_t)atoi(argv[2]), &count) != SMALLM_OK) return 1;
    for (size_t i = 0; i < count; i++) {
        print_hex(found[i].text, strlen(found[i].text));
        printf(" %.9g\n", found[i].probability);
    }
    close_context(context);
    return 0;
}

static void print_rest(smallm_context *context)
{
    const char *text;
    size_t bytes;
    while (smallm_next(context, &text, &bytes) == SMALLM_OK) print_hex(text, bytes);
    printf("\n");
}

/* A text; the same text after a cancelled call before each chunk; a copy made after each chunk, at its end; and the same
   text in steps with others of other lengths. All lines must be equal. */
static int print_variants(char **argv)
{
    smallm_context *context = open_context(argv[0], NULL, 1), *copy, *many[60];
    const smallm_model *model = context->model;
    smallm_options options;
    const char *text, *stops[] = {argv[2]};
    size_t bytes, length = strlen(argv[1]);
    smallm_default_options(model, &options, sizeof options);
    options.max_length = 40, options.rng_seed = 5, options.stops = stops, options.stop_count = 1;
    options.banned = "q", options.overflow = SMALLM_SHIFT;
    if (smallm_generate_start(context, argv[1], length, &options) != SMALLM_OK) return 1;
    print_rest(context);
    smallm_generate_start(context, argv[1], length, &options);
    for (smallm_status status = SMALLM_OK; status != SMALLM_DONE;) {
        smallm_cancel(context);
        status = smallm_next(context, &text, &bytes);
        if (status == SMALLM_CANCELLED) status = smallm_next(context, &text, &bytes);
        if (status == SMALLM_OK) print_hex(text, bytes);
    }
    printf("\n");
    smallm_generate_start(context, argv[1], length, &options);
    for (int i = 0; i < 4; i++) {
        if (smallm_context_copy(context, &copy) != SMALLM_OK) return 1;
        smallm_context *swap = context;
        context = copy, copy = swap;
        print_hex("", 0);
        if (smallm_next(copy, &text, &bytes) != SMALLM_OK) return 1; /* the original goes another way */
        smallm_context_free(copy);
        if (smallm_next(context, &text, &bytes) == SMALLM_OK) print_hex(text, bytes);
    }
    print_rest(context);
    for (int i = 0; i < 60; i++) {
        if (smallm_context_new(model, &many[i]) != SMALLM_OK) return 1;
        options.max_length = i % 3 == 0 ? 40 : i;
        options.stream_number = i % 3 == 0 ? 0 : (uint32_t)i;
        if (smallm_generate_start(many[i], argv[1], i % 3 == 0 ? length : (size_t)i % 2, &options) != SMALLM_OK) return 1;
    }
    char *texts = calloc(20, 1024);
    for (smallm_status status = SMALLM_OK; status == SMALLM_OK;) {
        status = smallm_step(many, 60);
        for (int i = 0; i < 60; i++)
            while (smallm_take(many[i], &text, &bytes) == SMALLM_OK && bytes > 0)
                if (i % 3 == 0) strncat(texts + 1024 * (i / 3), text, bytes);
        if (status > SMALLM_DONE) printf("failed\n");
    }
    for (int i = 0; i < 20; i++) {
        print_hex(texts + 1024 * i, strlen(texts + 1024 * i));
        printf("\n");
    }
    for (int i = 0; i < 60; i++) smallm_context_free(many[i]);
    free(texts);
    close_context(context);
    return 0;
}

/* Continues with other random numbers after 60 characters; with stop strings, several characters may come at once. */
static void reseed_once(smallm_context *context, int *reseeded)
{
    if (context->state.length < 60 || context->state.stop_count > 0 || (*reseeded)++ > 0) return;
    smallm_reseed(context, 9, 9);
}

/* Writes a text and the bits of its log-probabilities. mixed: some ids by smallm_step, some after a copy or a cancelled call.
   Returns how often drafts were waiting after a call. */
static int print_drafted(smallm_context **context, const char *seed, const smallm_options *options, int mixed)
{
    smallm_context *copy;
    const char *text;
    double all[400];
    size_t bytes, count, known = 0;
    int waiting = 0, reseeded = 0;
    smallm_status status = smallm_generate_start(*context, seed, strlen(seed), options);
    for (int i = 0; status == SMALLM_OK || status == SMALLM_CANCELLED; i++) {
        if (mixed && i % 5 == 1) smallm_step(context, 1);
        reseed_once(*context, &reseeded);
        if (mixed && i % 5 == 2) smallm_cancel(*context);
        if (mixed && i % 5 == 3 && smallm_context_copy(*context, &copy) == SMALLM_OK)
            smallm_context_free(*context), *context = copy;
        status = smallm_next(*context, &text, &bytes);
        reseed_once(*context, &reseeded);
        waiting += (*context)->state.drafts > 0;
        if (status != SMALLM_OK) continue;
        print_hex(text, bytes);
        const double *logprobs = smallm_logprobs(*context, &count);
        memcpy(all + known, logprobs, count * sizeof *all);
        known += count;
    }
    print_hex((const char *)all, known * sizeof *all);
    printf(" %d\n", (int)status);
    return waiting;
}

/* For several options: a text without drafts, twice with drafts, and how often drafts were waiting; with these kernels, and
   with the draft table beside the model even where it would not pay. */
static int print_drafts(char **argv)
{
    smallm_context *context = open_context(argv[0], strcmp(argv[2], "-") == 0 ? NULL : argv[2], 1);
    const char *stops[] = {"owls fly", " . ."};
    smallm_options options;
    if (find_draft_table((smallm_model *)context->model, argv[0], SIZE_MAX) != SMALLM_OK) return 1;
    for (int i = 0; i < 12; i++) {
        smallm_default_options(context->model, &options, sizeof options);
        options.max_length = 90, options.logprobs = 1, options.rng_seed = (uint32_t)i, options.max_drafts = 0;
        if (i % 4 == 1) options.overflow = SMALLM_CROP;
        if (i % 4 == 2) options.repetition_penalty = 1.2, options.repetition_window = 8, options.top_p = 0.9;
        if (i % 4 == 3) options.stops = stops, options.stop_count = 2, options.min_length = 20, options.banned = "q";
        if (i % 6 == 0) options.temperature = 0;
        print_drafted(&context, argv[1], &options, 0);
        options.max_drafts = 1 + i % 4;
        int waiting = print_drafted(&context, argv[1], &options, 0);
        print_drafted(&context, argv[1], &options, 1);
        printf("%d\n", waiting);
    }
    close_context(context);
    return 0;
}

/* The metadata value of each key; then the ids of a text, and the text of these ids. */
static int print_getters(char **argv)
{
    smallm_context *context = open_context(argv[0], NULL, 1);
    const smallm_model *model = context->model;
    size_t bytes, count;
    int32_t ids[100];
    char text[100 * MAX_PUSHED + 1];
    printf("%d %zu %zu %zu\n", smallm_version(), smallm_block_size(model), smallm_vocab_size(model), smallm_window(model));
    const char *json = smallm_metadata(model, argv[1], &bytes);
    printf("%.*s\n", (int)bytes, json);
    printf("%d\n", smallm_metadata(model, "smallm.nothing", &bytes) == NULL && bytes == 0);
    if (smallm_encode(model, argv[2], strlen(argv[2]), ids, 100, &count) != SMALLM_OK) return 1;
    for (size_t i = 0; i < count; i++) printf("%ld ", (long)ids[i]);
    printf("\n");
    if (smallm_decode(model, ids, count, text, sizeof text, &bytes) != SMALLM_OK) return 1;
    print_hex(text, bytes);
    printf("\n%d", (int)smallm_encode(model, argv[2], strlen(argv[2]), ids, count - 1, &count));
    printf(" %d", (int)smallm_encode(model, "\xff", 1, ids, 100, &count));
    ids[0] = model->vocab_size;
    printf(" %d", (int)smallm_decode(model, ids, 1, text, sizeof text, &bytes));
    ids[0] = 65;
    printf(" %d\n", (int)smallm_decode(model, ids, 1, text, 2, &bytes));
    close_context(context);
    return 0;
}

/* The call comes first: it may set the handle. */
#define SAY_MODEL(what, call, model)                                                \
    do {                                                                            \
        smallm_status status_ = (call);                                             \
        printf("%s: %d %s\n", what, (int)status_, smallm_model_error(model));       \
    } while (0)
#define SAY(what, call, context)                                                    \
    do {                                                                            \
        smallm_status status_ = (call);                                             \
        printf("%s: %d %s\n", what, (int)status_, smallm_error(context));           \
    } while (0)

static smallm_status start_with(smallm_context *context, smallm_options options)
{
    return smallm_generate_start(context, "a", 1, &options);
}

/* Every mistake that the interface allows. */
static int make_mistakes(char **argv)
{
    smallm_model *model = NULL;
    smallm_context *context = NULL;
    smallm_options options;
    smallm_open_options opening = {sizeof opening, "mmx", 0};
    smallm_character next[2];
    const char *text, *stops[] = {"\xff", NULL};
    size_t bytes, count;
    double nats[4];
    SAY_MODEL("no place for the model", smallm_open(argv[0], NULL, NULL), NULL);
    SAY_MODEL("no path", smallm_open(NULL, NULL, &model), model);
    SAY("context of a model that is not open", smallm_context_new(model, &context), context);
    smallm_close(model);
    SAY_MODEL("no data", smallm_open_memory(NULL, 10, NULL, &model), model);
    smallm_close(model);
    SAY_MODEL("empty data", smallm_open_memory("", 0, NULL, &model), model);
    smallm_close(model);
    SAY_MODEL("kernels", smallm_open(argv[0], &opening, &model), model);
    smallm_close(model);
    opening.kernels = NULL, opening.threads = 257;
    SAY_MODEL("too many threads", smallm_open(argv[0], &opening, &model), model);
    smallm_close(model);
    opening.size = 1;
    SAY_MODEL("open options without size", smallm_open(argv[0], &opening, &model), model);
    smallm_close(model);
    opening.size = sizeof opening.size;
    SAY_MODEL("open options of the past", smallm_open(argv[0], &opening, &model), model);
    smallm_close(model);
    struct { smallm_open_options known; int64_t unknown; } later = {{sizeof later, NULL, 2}, 0};
    SAY_MODEL("open options of the future", smallm_open(argv[0], &later.known, &model), model);
    smallm_close(model);
    later.unknown = 1;
    SAY_MODEL("an open option of the future", smallm_open(argv[0], &later.known, &model), model);
    smallm_close(model);
    smallm_close(NULL);
    smallm_context_free(NULL);
    smallm_cancel(NULL);
    SAY("no context", smallm_next(NULL, &text, &bytes), NULL);
    if (smallm_open(argv[0], NULL, &model) != SMALLM_OK) return 1;
    SAY("no place for the context", smallm_context_new(model, NULL), NULL);
    if (smallm_context_new(model, &context) != SMALLM_OK) return 1;
    SAY("next before start", smallm_next(context, &text, &bytes), context);
    SAY("step before start", smallm_step(&context, 1), context);
    SAY("take before start", smallm_take(context, &text, &bytes), context);
    SAY("a seed that is NULL", smallm_generate_start(context, NULL, 3, NULL), context);
    SAY("a seed that is not UTF-8", smallm_generate_start(context, "ab\xc3", 3, NULL), context);
    SAY("a surrogate", smallm_generate_start(context, "\xed\xa0\x80", 3, NULL), context);
    memset(&options, 0, sizeof options);
    SAY("options without size", start_with(context, options), context);
#define WITH(change)                                           \
    smallm_default_options(model, &options, sizeof options);   \
    options.change;                                            \
    SAY(#change, start_with(context, options), context)
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
    WITH(max_drafts = -1);
    WITH(max_drafts = 5);
    WITH(min_length = 501);
    WITH(overflow = SMALLM_SLIDE);
    WITH(overflow = 3);
    WITH(allowed = "");
    WITH(allowed = "\xff");
    WITH(banned = "a\xc3");
    options.allowed = "aé", options.banned = "éa";
    SAY("allowed and banned alike", start_with(context, options), context);
    WITH(stop_count = 1);
    options.stops = stops + 1;
    SAY("a stop that is NULL", start_with(context, options), context);
    options.stops = stops;
    SAY("a stop that is not UTF-8", start_with(context, options), context);
    SAY("next after a start that failed", smallm_next(context, &text, &bytes), context);
    struct { smallm_options known; int64_t unknown; } newer;
    memset(&newer, 0, sizeof newer);
    smallm_default_options(model, &newer.known, sizeof newer);
    SAY("options of the future", smallm_generate_start(context, "a", 1, &newer.known), context);
    newer.unknown = 1;
    SAY("an option of the future", smallm_generate_start(context, "a", 1, &newer.known), context);
    WITH(max_length = INT64_MAX);
    options.size = offsetof(smallm_options, top_k);
    options.top_k = -5;
    SAY("options of the past", start_with(context, options), context);
    for (int i = 0; i < 100; i++)
        if (smallm_next(context, &text, &bytes) != SMALLM_OK) return 1;
    SAY("next without a place", smallm_next(context, NULL, NULL), context);
    SAY("next again", smallm_next(context, &text, &bytes), context);
    SAY("start with the last chunk", smallm_generate_start(context, text, bytes, NULL), context);
    if (smallm_next(context, &text, &bytes) != SMALLM_OK) return 1;
    WITH(allowed = text);
    SAY("next of one character", smallm_next(context, &text, &bytes), context);
    count = 0;
    while (count < 100 && smallm_step(&context, 1) == SMALLM_OK) count++;
    SAY("steps without take", smallm_step(&context, 1), context);
    WITH(max_length = 0);
    SAY("next of nothing", smallm_next(context, &text, &bytes), context);
    SAY("next of nothing, again", smallm_next(context, &text, &bytes), context);
    SAY("next of nothing in a step", smallm_step(&context, 1), context);
    SAY("no contexts", smallm_step(NULL, 1), NULL);
    SAY("score without a place", smallm_score(context, "abc", 3, NULL, 0, &count), context);
    printf("%lu\n", (unsigned long)count);
    SAY("score with too little room", smallm_score(context, "abc", 3, nats, 2, &count), context);
    SAY("score of no UTF-8", smallm_score(context, "\x80", 1, nats, 4, &count), context);
    SAY("score of nothing", smallm_score(context, NULL, 0, nats, 4, &count), context);
    SAY("score without a count", smallm_score(context, "abc", 3, nats, 4, NULL), context);
    SAY("next characters without a place", smallm_next_characters(context, "a", 1, NULL, 2, &count), context);
    SAY("next characters without a count", smallm_next_characters(context, "a", 1, next, 2, NULL), context);
    SAY("next characters of no UTF-8", smallm_next_characters(context, "\x80", 1, next, 2, &count), context);
    SAY("no next characters", smallm_next_characters(context, "a", 1, NULL, 0, &count), context);
    smallm_context_free(context);
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

static void *write_text(void *shared)
{
    smallm_context *context;
    smallm_options options;
    const char *chunk;
    size_t bytes;
    char *text = calloc(1, 4096);
    if (smallm_context_new(shared, &context) != SMALLM_OK) return text;
    smallm_default_options(shared, &options, sizeof options);
    options.max_length = 200;
    if (smallm_generate_start(context, "the ", 4, &options) == SMALLM_OK)
        while (smallm_next(context, &chunk, &bytes) == SMALLM_OK) strcat(text, chunk);
    smallm_context_free(context);
    return text;
}

/* The same text from several threads that share a model, which has threads itself; then from a process that was forked,
   which has none of them. */
static int print_threads(char **argv)
{
    smallm_context *context = open_context(argv[0], NULL, (size_t)atoi(argv[1]));
    void *shared = (void *)context->model;
    pthread_t threads[3];
    void *text;
    for (int i = 0; i < 3; i++)
        if (pthread_create(&threads[i], NULL, write_text, shared) != 0) return 1;
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], &text);
        printf("%s\x1e", (char *)text);
        free(text);
    }
#ifndef _WIN32 /* which has no fork */
    int state = 0;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        text = write_text(shared);
        printf("%s\x1e", (char *)text);
        free(text);
        close_context(context);
        fflush(stdout);
        _exit(0); /* without the search for leaks, which expects the other threads */
    }
    if (waitpid(child, &state, 0) != child || state != 0) return 1;
#endif
    close_context(context);
    printf("closed");
    return 0;
}

/* A text without end, in a thread of its own. */
typedef struct {
    smallm_context *context;
    smallm_status status;
    int chunks;
} endless_text;

static void *write_endlessly(void *shared)
{
    endless_text *t = shared;
    const char *chunk;
    size_t bytes;
    while ((t->status = smallm_next(t->context, &chunk, &bytes)) == SMALLM_OK)
        __atomic_fetch_add(&t->chunks, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

/* Cancels a text from another thread; writes the statuses then and of the next call. */
static int print_cancelled(char **argv)
{
    endless_text t = {open_context(argv[0], NULL, (size_t)atoi(argv[1])), SMALLM_OK, 0};
    smallm_options options;
    pthread_t writer;
    const char *chunk;
    size_t bytes;
    smallm_default_options(t.context->model, &options, sizeof options);
    options.max_length = INT64_MAX;
    if (smallm_generate_start(t.context, "the ", 4, &options) != SMALLM_OK) return 1;
    if (pthread_create(&writer, NULL, write_endlessly, &t) != 0) return 1;
    while (__atomic_load_n(&t.chunks, __ATOMIC_SEQ_CST) < 100) sched_yield();
    smallm_cancel(t.context);
    pthread_join(writer, NULL);
    printf("%d ", (int)t.status);
    printf("%d\n", (int)smallm_next(t.context, &chunk, &bytes));
    close_context(t.context);
    return 0;
}

static int perform(int argc, char **argv)
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
    if (strcmp(what, "logits") == 0) return print_logits(argv + 2);
    if (strcmp(what, "attention") == 0) return print_attention(argv + 2);
    if (strcmp(what, "next") == 0) return print_next(argv + 2);
    if (strcmp(what, "variants") == 0) return print_variants(argv + 2);
    if (strcmp(what, "drafts") == 0) return print_drafts(argv + 2);
    if (strcmp(what, "getters") == 0) return print_getters(argv + 2);
    if (strcmp(what, "threads") == 0) return print_threads(argv + 2);
    if (strcmp(what, "cancelled") == 0) return print_cancelled(argv + 2);
    return 2;
}

/* The same with a stack that begins some bytes further down. */
static int perform_shifted(size_t bytes, int argc, char **argv)
{
    volatile char room[bytes];
    room[0] = 0;
    return perform(argc, argv) + room[0];
}

int main(int argc, char **argv)
{
#ifdef _WIN32
    for (int file = 0; file < 3; file++) _setmode(file, _O_BINARY);
#endif
    if (argc > 2 && strcmp(argv[1], "shifted") == 0)
        return perform_shifted((size_t)atoi(argv[2]), argc - 2, argv + 2);
    return perform(argc, argv);
}

/* The implementation of smallm.h in C99.

   In this order: functions of real numbers; bytes and text; the vocabulary; JSON; the check of the ONNX file; the
   manifest; the weights; the forward pass; the sampler; allowed characters; the state of a text; measuring; the public
   functions. smallm_kernels.h has the arithmetic for each instruction set, smallm_threads.h the threads. SAMPLING.md
   specifies the text that results. The Python package has the same parts in model_file/onnx_reader.py,
   model_file/manifest.py, export/graph.py, generation/sampler.py, generation/logits_processors.py and
   generation/sequence_state.py. */

#ifdef SMALLM_SHARED
#define SMALLM_BUILD
#endif
#if defined(__linux__) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* for MADV_HUGEPAGE */
#endif
#include "smallm.h"

#include <float.h>
#include <math.h> /* sqrtf, which rounds correctly everywhere, and isnan, isfinite */
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#include <windows.h>
#elif defined(__linux__)
#include <sys/mman.h>
#endif

/* Equal bits everywhere: no fused or reordered arithmetic, and no wider intermediate results. */
#ifdef __FAST_MATH__
#error "smallm.c must not be compiled with -ffast-math: the same seed would not give the same text"
#endif
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "smallm.c needs arithmetic in single precision; for 32-bit x86 add -msse2 -mfpmath=sse"
#endif
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#if defined(__SEH__) /* GCC on 64-bit Windows aligns variables of 32 and 64 bytes only in functions without these tables */
#pragma GCC optimize("no-asynchronous-unwind-tables", "no-unwind-tables")
#endif
#elif defined(_MSC_VER)
#pragma fp_contract(off)
#endif

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)") /* it ignores GCC's pragma, and would keep sums in memory */
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#else
#define INLINE inline
#define UNROLL
#endif

#include "smallm_threads.h"

enum {
    FORMAT_VERSION = 1,
    MAX_LAYERS = 999,
    MAX_START_IDS = 999,
    MAX_NODES = 20000,       /* of the graph; also its initialisers */
    MAX_DIMENSIONS = 8,
    MAX_ROWS = 96,           /* ids that a pass computes together: half of that for small layers, of which more gain nothing */
    SMALL_LAYER = 1 << 20,   /* weights */
    MAX_THREADS = 256,
    VALUE_BLOCK = 64,        /* positions whose attention weights share a scale, in 8 bits */
    PANELS_TOGETHER = 6,     /* of a product, for the same thread: what the kernels of AVX2 and AVX-512 compute at a time */
    MAX_PUSHED = 24,         /* bytes of text that an id can complete: each of its 4 bytes can give two U+FFFD */
    CODE_POINTS = 0x110000,
    MAX_DRAFTS = 4,          /* in a pass; also the room of a history beyond its ids */
    DRAFT_CONTEXT = 4,       /* ids of context in a draft table, at most */
    ALTERNATIVES = 8,        /* ids that a draft table has for a context */
    NO_ID = 255,             /* as nats in a draft table */
    ERROR_BYTES = 600
};
#define MAX_SIZE (1 << 24)
#define MAX_SAMPLING 9007199254740992.0 /* 2^53 */
#define MAX_FILE 0x7fffffffu            /* bytes: the limit of protobuf */
#define MAX_KNOWN_SIZE (1 << 30)        /* bytes of a file for which memory is allocated before it is read */
#define LARGE_PAGE ((size_t)2 << 20)
#define MAX_SMALL_CACHE (64u << 20)     /* bytes of KV cache that a file of any size may ask for */
#define MIN_TEMPERATURE 1e-200          /* a lower temperature changes nothing, but a division could overflow */
#define MIN_CHANCE 0.55                 /* that a draft is right; see also write_drafts */
#define BIG_FILE (8u << 20)             /* bytes: the caches of many processors do not hold such a model */
#define MIN_PROBABILITY 1e-6            /* of the characters of several ids that smallm_next_characters finds */
#define ROUNDER 12582912.0f             /* 1.5 * 2^23: x + ROUNDER - ROUNDER is x rounded to an integer */

/* Weights and caches begin at this multiple of bytes: loads of 64 bytes that cross cache lines take twice as long. Not with
   AddressSanitizer, which could not see the bytes behind an array. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ALIGNMENT 16
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define ALIGNMENT 16
#elif !defined(ALIGNMENT)
#define ALIGNMENT 64
#endif

/* A range of memory that is owned elsewhere. */
typedef struct {
    const uint8_t *at, *end;
} span;

/* An id of 256 or more, and its bytes. */
typedef struct {
    uint8_t length, bytes[4];
    int32_t id;
} token;

/* The bytes of an incomplete character. */
typedef struct {
    uint8_t bytes[4];
    int length;
} pending;

/* A weight matrix in panels of 16 outputs, the last one padded with zeros: fp32, or 8 bits with a scale and a correction
   (-128 times the sum of the codes) for each output and block of inputs. */
typedef struct {
    size_t inputs, outputs, panels;
    const float *values; /* (panels, inputs, 16); NULL if quantised */
    size_t blocks, block;
    size_t stride;       /* blocks from one panel to the next, `blocks` or more */
    const int8_t *codes; /* (panels, stride * block / 4, 16, 4) */
    const float *scales; /* (panels, stride, 16) */
    const int32_t *corrections;
} matrix;

/* The keys and values of a head in 8 bits, read as the codes of two matrices: positions are the outputs of the keys and the
   inputs of the values. */
typedef struct {
    int8_t *keys, *values; /* (positions / 16, head_dim / 4, 16, 4), (head_dim / 16, positions / 4, 16, 4) */
    float *key_scales, *value_scales;             /* (positions) */
    int32_t *key_corrections, *value_corrections; /* (positions), (head_dim / 16, positions / VALUE_BLOCK, 16) */
} cache8;

typedef struct {
    void (*product)(const float *x, size_t x_stride, size_t rows, const float *w, size_t panel_stride, size_t inputs,
                    size_t panels, float *y, size_t y_stride);
    void (*product8)(const int8_t *x, const float *x_scales, size_t x_stride, size_t rows, const matrix *w, float *y,
                     size_t y_stride);
    void (*norm)(const float *x, const float *gain, float *y, size_t length);
    void (*swiglu)(const float *gate, const float *up, float *y, size_t length);
    float (*softmax)(float *scores, size_t from, size_t first, size_t end, size_t padded);
    void (*scale)(float *x, const float *factors, size_t length);
    void (*exponentials)(double *x, size_t count);
    void (*quantise)(const float *x, size_t inputs, size_t blocks, size_t block, int8_t *codes, float *scales);
    size_t lanes; /* floats in a vector */
} kernels;

/* A row of the draft table (generation/draft_table.py): ids that may follow a context. The context packs its ids, each plus
   1, the newest in the lowest 16 bits. nats: by how many 1/32 nats each id is less likely than the likeliest; 255 = no id. */
typedef struct {
    uint64_t context;
    uint16_t ids[ALTERNATIVES];
    uint8_t nats[ALTERNATIVES];
} draft_row;

/* Names as in export/graph.py. */
typedef struct {
    matrix qkv, attention_out, gate_up, down;
    const float *ln_1, *ln_2, *qk_gain;
} layer;

struct smallm_model {
    char error[ERROR_BYTES];
    char name[256]; /* the name of the model in messages */
    bool open;
    const char *kernel_name;
    const kernels *kernels;
    size_t threads;
    pool *pool; /* NULL with one thread */
    void **allocations;
    size_t allocation_count, allocation_room;

    /* The manifest. */
    int32_t block_size, n_layer, n_head, n_kv_head, n_embd, head_dim, vocab_size, window;
    double rope_theta, temperature, top_p, min_p;
    int64_t top_k;
    token *tokens, *sorted; /* by id; by bytes */
    size_t token_count;
    uint8_t *start_text, *metadata; /* metadata: the entries as in the file */
    size_t start_bytes, metadata_bytes;

    /* The weights. Padded sizes, head_dim and n_embd are multiples of 16, positions of VALUE_BLOCK. */
    size_t inner, padded_inner, padded_vocab, positions, heads; /* heads: of queries, keys and values */
    size_t cache_part;     /* floats of memory for the keys of a head, and again for its values */
    layer *layers;         /* (n_layer) */
    const float *embedding; /* (vocab_size, n_embd) */
    const float *table;    /* (vocab_size, heads * head_dim): the first layer's queries, keys and values; NULL if none */
    const float *ln_f;
    matrix head;           /* logits */
    const float *cos, *sin; /* (block_size, head_dim / 2) */
    float *rotation;       /* (head_dim): cosines, then sines, that rotate keys back when the cache slides */
    size_t max_codes, max_blocks; /* of the inputs of quantised matrices */
    size_t rows;           /* ids that a pass computes together */
    float *ones;           /* the scales of the values in a KV cache of 8 bits; NULL if the cache is in fp32 */
    const draft_row *draft_table; /* (draft_rows), by context; NULL if none, or if it would not pay */
    size_t draft_rows;
};

/* A stop string, and the length in bytes of its longest prefix that the text ends with (Knuth, Morris, Pratt 1977). */
typedef struct {
    const uint8_t *word;
    size_t length, matched;
    size_t *borders; /* for each prefix of word: length of its longest proper prefix that is also its suffix */
} stop;

/* The state of the text that is being generated. */
typedef struct {
    smallm_options options;    /* without its strings */
    bool begun, done;
    uint32_t key, draws;
    int64_t length;            /* number of new characters */
    size_t known;              /* ids in history */
    size_t cached, wanted;     /* ids in the KV cache, now and when the pass that was begun is complete */
    size_t drafts;             /* ids behind `known` in history that the cache holds as well, not chosen yet */
    size_t row;                /* of the logits of the last pass that the last id was chosen from */
    double draft_weights[256]; /* by the nats of an id in the draft table */
    double acceptance;         /* moving average of how often drafts are right, divided by their chance */
    pending decoder;
    stop *stops;
    size_t stop_count;
    char *words;               /* memory of the stop strings */
    size_t *borders;
    uint64_t *characters;      /* (CODE_POINTS / 64): a bit per character, 1 = allowed; NULL = all are allowed */
    bool *allowed;             /* (vocab_size): whether an id may follow the bytes in `allowed_after` */
    pending allowed_after;
    char *text;                /* characters that are certain, then the possible beginning of a stop string */
    double *logprobs;          /* at the first byte of each character of `text` */
    char *chunk;               /* the text that was returned last */
    double *chunk_logprobs;    /* of each character of `chunk` */
    size_t chunk_characters;
    double logprob;            /* of the ids of an incomplete character */
    size_t ready, held, room;  /* bytes of `text` that are certain; that are held back; that it has room for */
} sequence_state;

struct smallm_context {
    char error[ERROR_BYTES];
    const smallm_model *model;
    volatile int cancelled;
    pool *pool;            /* of the model, during a pass; NULL if it has none, or another pass uses it */
    float *keys, *values;  /* (n_layer, n_kv_head) times (positions / 16, head_dim, 16), (head_dim / 16, positions, 16); or
                              memory of a cache8 */
    float *stream, *normed, *packed, *scores, *mixed, *hidden, *logits; /* rows of a pass */
    int8_t *codes;         /* rows of a pass in 8 bits */
    float *code_scales;
    int8_t *head_codes;    /* rows of a head in 8 bits */
    float *head_scales;
    int32_t *history;      /* (2 block_size): the last block_size ids or more, if there are so many */
    float *processed;      /* (vocab_size): logits after repetition penalty and allowed characters */
    uint64_t *sort_keys, *order, *spare; /* (vocab_size): sort keys of the ids; sorted keys; buffer for sorting */
    double *weights;       /* (vocab_size) */
    sequence_state state;
};

/* Returns from the function if the call fails. */
#define TRY(call)                                  \
    do {                                           \
        smallm_status status_ = (call);            \
        if (status_ != SMALLM_OK) return status_;  \
    } while (0)

/* Stores the error message, without control characters, and returns the status. */
static smallm_status fail(char *error, smallm_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, ERROR_BYTES, format, arguments);
    va_end(arguments);
    for (char *c = error; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = ' ';
    return status;
}

static smallm_status no_memory(char *error)
{
    return fail(error, SMALLM_NO_MEMORY, "there is not enough memory for this; use a smaller model");
}

static smallm_status bad_model(smallm_model *model, const char *reason)
{
    return fail(model->error, SMALLM_BAD_MODEL, "%s is not a smallm model: %s; write one with export.py", model->name,
                reason);
}

static smallm_status broken_metadata(smallm_model *model)
{
    return fail(model->error, SMALLM_BAD_MODEL, "%s has broken metadata; export the model again", model->name);
}

static smallm_status other_graph(smallm_model *model, const char *what)
{
    return fail(model->error, SMALLM_BAD_MODEL, "%s: this smallm.c does not know the %s of its graph; export the model "
                "again", model->name, what);
}

static smallm_status not_finite(char *error)
{
    return fail(error, SMALLM_BAD_MODEL, "the model's logits are not finite: its weights are broken; train it again");
}

/* Zeroed memory at a multiple of ALIGNMENT, for free_aligned; NULL if there is not enough. */
static void *allocate(size_t count, size_t size)
{
    if (count > (SIZE_MAX - 2 * ALIGNMENT) / size) return NULL;
    char *memory = calloc(count * size + ALIGNMENT, 1);
    if (memory == NULL) return NULL;
    size_t before = ALIGNMENT - (size_t)((uintptr_t)memory % ALIGNMENT); /* 1 to ALIGNMENT, kept in the last of them */
    memory[before - 1] = (char)before;
    return memory + before;
}

static void free_aligned(void *memory)
{
    char *at = memory;
    if (at != NULL) free(at - at[-1]);
}

/* -- functions of real numbers, the same on every system -- */

/* e^x for x up to 0: 2^n times the Taylor series of the remainder, at most ln 2 / 2. Without branches, for vectors. */
static INLINE double exponential(double x)
{
    static const double TAYLOR[14] = {
        1, 1, 1 / 2.0, 1 / 6.0, 1 / 24.0, 1 / 120.0, 1 / 720.0, 1 / 5040.0, 1 / 40320.0, 1 / 362880.0, 1 / 3628800.0,
        1 / 39916800.0, 1 / 479001600.0, 1 / 6227020800.0};
    double moved = (x > -745 ? x : -745) + (x < -708 ? 64.0 : 0.0); /* 2^n is a normal number */
    double factor = (x < -708 ? 1.6038108905486378e-28 : 1.0) * (x < -745 ? 0.0 : 1.0); /* e^-64 */
    int whole = (int)(moved * 1.4426950408889634 - 0.5);
    double n = whole, r = (moved - n * 0.69314718036912382) - n * 1.9082149292705877e-10, e = TAYLOR[13];
    UNROLL for (int i = 12; i >= 0; i--) e = e * r + TAYLOR[i];
    uint64_t bits = (uint64_t)(1023 + whole) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return e * power * factor;
}

/* ln x for x > 0: with x = 2^n times m, the series of ln m in (m - 1) / (m + 1). */
static double logarithm(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int n = (int)(bits >> 52) - 1023;
    bits = (bits & 0xFFFFFFFFFFFFFu) | (uint64_t)1023 << 52;
    memcpy(&x, &bits, sizeof x);
    if (x > 1.4142135623730951) x /= 2, n++;
    double s = (x - 1) / (x + 1), sum = 0;
    for (int k = 23; k > 1; k -= 2) sum = sum * s * s + 1.0 / k;
    return n * 0.69314718036912382 + (n * 1.9082149292705877e-10 + 2 * s * s * s * sum + 2 * s);
}

/* cos x and sin x for x from 0 to 10^9, from the Taylor series of the remainder of pi / 2. */
static void cosine_and_sine(double x, float *cosine, float *sine)
{
    if (!(x < 1e9)) x = 0; /* no model that can be used has such an angle */
    int n = (int)(x * 0.63661977236758138 + 0.5);
    double r = (x - n * 1.5707963267341256) - n * 6.0771005065061922e-11, c = 1, s = 1;
    for (int k = 18; k > 0; k -= 2) {
        c = 1 - r * r / (k * (k - 1)) * c;
        s = 1 - r * r / (k * (k + 1)) * s;
    }
    s *= r;
    *cosine = (float)(n % 4 == 0 ? c : n % 4 == 1 ? -s : n % 4 == 2 ? -c : s);
    *sine = (float)(n % 4 == 0 ? s : n % 4 == 1 ? c : n % 4 == 2 ? -s : -c);
}

/* -- bytes and text -- */

static span span_of(const void *data, size_t bytes)
{
    span s = {(const uint8_t *)data, (const uint8_t *)data + bytes};
    return s;
}

static size_t size_of(span s) { return (size_t)(s.end - s.at); }

static bool is(span s, const char *word)
{
    return size_of(s) == strlen(word) && memcmp(s.at, word, size_of(s)) == 0;
}

static bool continues(uint8_t byte) { return (byte & 0xC0) == 0x80; }

/* The length of the UTF-8 sequence that begins with this byte; 0 for an invalid first byte. */
static int sequence_length(uint8_t lead)
{
    return lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
}

/* Whether a byte may come at this index (1, 2, 3) of a UTF-8 sequence: no overlong forms, no surrogates. */
static bool fits(uint8_t lead, int index, uint8_t byte)
{
    if (!continues(byte)) return false;
    if (index > 1) return true;
    return lead == 0xE0 ? byte >= 0xA0 : lead == 0xED ? byte < 0xA0 : lead == 0xF0 ? byte >= 0x90 :
           lead == 0xF4 ? byte < 0x90 : true;
}

/* The length of the character at the beginning of the text; 0 if there is no valid character. */
static int character_length(span text)
{
    if (text.at == text.end) return 0;
    int length = sequence_length(*text.at);
    if (length == 0 || size_of(text) < (size_t)length) return 0;
    for (int i = 1; i < length; i++)
        if (!fits(*text.at, i, text.at[i])) return 0;
    return length;
}

/* The end of the longest valid UTF-8 prefix of the text. */
static const uint8_t *valid_until(span text)
{
    int length;
    while ((length = character_length(text)) > 0) text.at += length;
    return text.at;
}

static bool is_text(span text) { return valid_until(text) == text.end; }

/* Adds a byte to the streaming decoder; writes the characters that it completes, and U+FFFD for invalid bytes. Returns
   the number of bytes written. */
static size_t push_byte(pending *decoder, uint8_t byte, char *text)
{
    static const char replacement[] = "\xEF\xBF\xBD";
    size_t written = 0;
    if (decoder->length > 0) {
        if (fits(decoder->bytes[0], decoder->length, byte)) {
            decoder->bytes[decoder->length++] = byte;
            if (decoder->length < sequence_length(decoder->bytes[0])) return 0;
            memcpy(text, decoder->bytes, (size_t)decoder->length);
            written = (size_t)decoder->length;
            decoder->length = 0;
            return written;
        }
        memcpy(text, replacement, 3);
        written = 3;
        decoder->length = 0;
    }
    if (sequence_length(byte) == 1) {
        text[written++] = (char)byte;
    } else if (sequence_length(byte) > 1) {
        decoder->bytes[decoder->length++] = byte;
    } else {
        memcpy(text + written, replacement, 3);
        written += 3;
    }
    return written;
}

/* -- the vocabulary: ids 0-255 are the bytes; ids from 256 up are non-ASCII characters, and prefixes of those that have
      3 or 4 bytes -- */

static int compare_tokens(const token *a, const token *b)
{
    int length = a->length < b->length ? a->length : b->length, order = memcmp(a->bytes, b->bytes, (size_t)length);
    return order != 0 ? order : a->length - b->length;
}

static int compare_sorted(const void *a, const void *b) { return compare_tokens(a, b); }

static token token_of(const uint8_t *bytes, int length)
{
    token t = {(uint8_t)length, {0, 0, 0, 0}, 0};
    memcpy(t.bytes, bytes, (size_t)length);
    return t;
}

/* The id of these bytes; -1 if they have no id. */
static int32_t find_id(const smallm_model *model, const uint8_t *bytes, int length)
{
    if (length == 1) return bytes[0];
    token wanted = token_of(bytes, length);
    size_t low = 0, high = model->token_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = compare_tokens(&model->sorted[middle], &wanted);
        if (order == 0) return model->sorted[middle].id;
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return -1;
}

/* Writes the ids of one character: the longest prefix that has an id, then single bytes. Returns their number. */
static int spell(const smallm_model *model, const uint8_t *bytes, int length, int32_t ids[4])
{
    int count = 0, first = length;
    while ((ids[0] = find_id(model, bytes, first)) < 0) first--;
    for (count = 1; first < length; first++) ids[count++] = bytes[first];
    return count;
}

static bool begins_character(int32_t id) { return id < 0x80 || id >= 0xC0; }

static int hex_digit(uint8_t c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 :
           c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Reads "c3a9 e282 e282ac" into tokens; false for any other format. `tokens` needs size / 3 + 1 elements. */
static bool read_tokens(span text, token *tokens, size_t *count)
{
    *count = 0;
    while (text.at < text.end) {
        token *t = &tokens[*count];
        if (*count > 0 && *text.at++ != ' ') return false;
        for (t->length = 0; text.end - text.at >= 2 && *text.at != ' '; text.at += 2) {
            int high = hex_digit(text.at[0]), low = hex_digit(text.at[1]);
            if (high < 0 || low < 0 || t->length == 4) return false;
            t->bytes[t->length++] = (uint8_t)(high << 4 | low);
        }
        if (t->length < 2) return false;
        t->id = 256 + (int32_t)(*count)++;
    }
    return true;
}

/* Whether each token occurs once, is a non-ASCII character or a prefix of the next token, and comes after its own prefix
   of two or more bytes. */
static bool is_vocabulary(const smallm_model *model)
{
    for (size_t i = 0; i < model->token_count; i++) {
        const token *t = &model->tokens[i], *next = t + 1;
        if (i > 0 && compare_tokens(&model->sorted[i - 1], &model->sorted[i]) == 0) return false;
        if (t->length > 2) {
            int32_t prefix = find_id(model, t->bytes, t->length - 1);
            if (prefix < 0 || prefix > t->id) return false;
        }
        if (character_length(span_of(t->bytes, t->length)) != t->length &&
            (i + 1 == model->token_count || next->length != t->length + 1 ||
             memcmp(next->bytes, t->bytes, t->length) != 0))
            return false; /* a prefix of no character */
    }
    return true;
}

/* Copies the tokens in the order of their bytes, for the binary search. */
static bool sort_tokens(smallm_model *model)
{
    size_t size = (model->token_count + 1) * sizeof *model->sorted;
    model->sorted = malloc(size);
    if (model->sorted == NULL) return false;
    memcpy(model->sorted, model->tokens, size); /* tokens has one spare element */
    qsort(model->sorted, model->token_count, sizeof *model->sorted, compare_sorted);
    return true;
}

/* -- JSON, the subset that the metadata use -- */

static void skip_space(span *json)
{
    while (json->at < json->end && strchr(" \t\r\n", *json->at) != NULL && *json->at != 0) json->at++;
}

static bool skip_char(span *json, char c)
{
    skip_space(json);
    if (json->at == json->end || *json->at != (uint8_t)c) return false;
    json->at++;
    return true;
}

/* An integer below 2^24. */
static bool json_size(span json, int32_t *value)
{
    int digits = 0;
    skip_space(&json);
    for (*value = 0; json.at < json.end && *json.at >= '0' && *json.at <= '9'; json.at++) {
        *value = *value * 10 + (*json.at - '0');
        if (++digits > 8 || (digits == 2 && *value < 10)) return false;
    }
    skip_space(&json);
    return digits > 0 && json.at == json.end && *value < MAX_SIZE;
}

/* A number. strtod depends on the decimal point of the locale. */
static bool json_number(span *json, double *value, bool *whole)
{
    uint64_t mantissa = 0;
    int exponent = 0, written = 0, digits = 0;
    skip_space(json);
    bool negative = skip_char(json, '-'), fraction = false;
    for (; json->at < json->end; json->at++) {
        if (*json->at == '.' && !fraction && digits > 0) {
            fraction = true;
        } else if (*json->at >= '0' && *json->at <= '9') {
            if (mantissa < UINT64_MAX / 10 - 1) {
                mantissa = mantissa * 10 + (uint64_t)(*json->at - '0');
                exponent -= fraction;
            } else if (!fraction) {
                exponent++;
            }
            if (++digits > 400) return false;
        } else {
            break;
        }
    }
    *whole = !fraction;
    if (json->at < json->end && (*json->at | 0x20) == 'e') {
        bool down = false;
        int digits_before = digits;
        json->at++;
        if (json->at < json->end && (*json->at == '+' || *json->at == '-')) down = *json->at++ == '-';
        for (; json->at < json->end && *json->at >= '0' && *json->at <= '9'; json->at++, digits++)
            if (written < 10000) written = written * 10 + (*json->at - '0');
        if (digits == digits_before) return false;
        exponent += down ? -written : written;
        *whole = false;
    }
    /* Exact for mantissas of up to 53 bits and powers of up to 10^22, which covers practical settings. */
    double power = 1;
    int left = exponent < 0 ? -exponent : exponent;
    for (; left > 22; left -= 22) power *= 1e22;
    double rest = 1;
    for (; left > 0; left--) rest *= 10;
    power *= rest;
    *value = exponent < 0 ? (double)mantissa / power : (double)mantissa * power;
    if (negative) *value = -*value;
    return digits > 0 && isfinite(*value);
}

static bool json_unit(span *json, uint32_t *unit)
{
    if (size_of(*json) < 4) return false;
    *unit = 0;
    for (int i = 0; i < 4; i++) {
        int digit = hex_digit(*json->at++);
        if (digit < 0) return false;
        *unit = *unit << 4 | (uint32_t)digit;
    }
    return true;
}

static uint8_t *put_code_point(uint8_t *at, uint32_t code)
{
    if (code < 0x80) {
        *at++ = (uint8_t)code;
    } else if (code < 0x800) {
        *at++ = (uint8_t)(0xC0 | code >> 6);
        *at++ = (uint8_t)(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
        *at++ = (uint8_t)(0xE0 | code >> 12);
        *at++ = (uint8_t)(0x80 | (code >> 6 & 0x3F));
        *at++ = (uint8_t)(0x80 | (code & 0x3F));
    } else {
        *at++ = (uint8_t)(0xF0 | code >> 18);
        *at++ = (uint8_t)(0x80 | (code >> 12 & 0x3F));
        *at++ = (uint8_t)(0x80 | (code >> 6 & 0x3F));
        *at++ = (uint8_t)(0x80 | (code & 0x3F));
    }
    return at;
}

/* An escape sequence after its backslash; lone surrogates are refused. */
static bool json_escape(span *json, uint8_t **to)
{
    static const char plain[] = "\"\"\\\\//b\bf\fn\nr\rt\t";
    if (json->at == json->end) return false;
    uint8_t c = *json->at++;
    uint32_t code, low;
    if (c != 'u') {
        for (const char *pair = plain; *pair; pair += 2)
            if (c == (uint8_t)*pair) {
                *(*to)++ = (uint8_t)pair[1];
                return true;
            }
        return false;
    }
    if (!json_unit(json, &code) || (code >= 0xDC00 && code < 0xE000)) return false;
    if (code >= 0xD800 && code < 0xDC00) {
        if (size_of(*json) < 2 || json->at[0] != '\\' || json->at[1] != 'u') return false;
        json->at += 2;
        if (!json_unit(json, &low) || low < 0xDC00 || low >= 0xE000) return false;
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    *to = put_code_point(*to, code);
    return true;
}

/* A string; `to` needs room for the bytes of its JSON form. */
static bool json_string(span *json, uint8_t *to, size_t *bytes)
{
    uint8_t *at = to;
    if (!skip_char(json, '"')) return false;
    while (json->at < json->end && *json->at != '"') {
        if (*json->at < 0x20) return false;
        if (*json->at != '\\') {
            *at++ = *json->at++;
        } else {
            json->at++;
            if (!json_escape(json, &at)) return false;
        }
    }
    *bytes = (size_t)(at - to);
    return skip_char(json, '"');
}

static bool at_end(span *json)
{
    skip_space(json);
    return json->at == json->end;
}

/* -- the ONNX file, checked before it is used, since files may come from untrusted sources --

   A protobuf message is a sequence of fields: a key (number << 3 | wire type), then the value. The tables list, for each
   message, the fields that a smallm model may have, as smallm/model_file/onnx_reader.py does; other fields are refused. */

typedef struct {
    uint64_t number, value; /* value: of a varint field */
    int wire_type;
    span bytes;             /* content of a field of another type */
} field;

typedef struct rule {
    uint8_t number;
    char kind; /* i int, f float, s string, b bytes, m message; capitals may be repeated */
    const struct rule *inner;
} rule;

static const rule ENTRY[] = {{1, 's', 0}, {2, 's', 0}, {0, 0, 0}}; /* key, value */
static const rule TENSOR[] = {
    {1, 'I', 0},  /* dims */
    {2, 'i', 0},  /* data_type */
    {8, 's', 0},  /* name */
    {9, 'b', 0},  /* raw_data */
    {12, 's', 0}, /* doc_string */
    {13, 'M', ENTRY}, /* external_data */
    {14, 'i', 0}, /* data_location */
    {0, 0, 0}};
static const rule ATTRIBUTE[] = {
    {1, 's', 0}, {2, 'f', 0}, {3, 'i', 0}, {4, 'b', 0}, /* name, f, i, s */
    {5, 'm', TENSOR}, {7, 'F', 0}, {8, 'I', 0}, {9, 'B', 0}, /* t, floats, ints, strings */
    {13, 's', 0}, {20, 'i', 0}, {0, 0, 0}}; /* doc_string, type */
static const rule NODE[] = {
    {1, 'S', 0}, {2, 'S', 0}, {3, 's', 0}, {4, 's', 0}, /* input, output, name, op_type */
    {5, 'M', ATTRIBUTE}, {6, 's', 0}, {7, 's', 0}, {0, 0, 0}}; /* attribute, doc_string, domain */
static const rule DIMENSION[] = {
    {1, 'i', 0}, {2, 's', 0}, {3, 's', 0}, {0, 0, 0}}; /* dim_value, dim_param, denotation */
static const rule SHAPE[] = {{1, 'M', DIMENSION}, {0, 0, 0}};
static const rule TENSOR_TYPE[] = {{1, 'i', 0}, {2, 'm', SHAPE}, {0, 0, 0}}; /* elem_type, shape */
static const rule TYPE[] = {{1, 'm', TENSOR_TYPE}, {0, 0, 0}};
static const rule VALUE[] = {{1, 's', 0}, {2, 'm', TYPE}, {3, 's', 0}, {0, 0, 0}}; /* name, type, doc_string */
static const rule GRAPH[] = {
    {1, 'M', NODE}, {2, 's', 0}, {5, 'M', TENSOR}, {10, 's', 0}, /* node, name, initializer, doc_string */
    {11, 'M', VALUE}, {12, 'M', VALUE}, {13, 'M', VALUE}, {0, 0, 0}}; /* input, output, value_info */
static const rule OPSET[] = {{1, 's', 0}, {2, 'i', 0}, {0, 0, 0}}; /* domain, version */
static const rule MODEL[] = {
    {1, 'i', 0}, {2, 's', 0}, {3, 's', 0}, {4, 's', 0}, /* ir_version, producer_name, producer_version, domain */
    {5, 'i', 0}, {6, 's', 0}, {7, 'm', GRAPH}, /* model_version, doc_string, graph */
    {8, 'M', OPSET}, {14, 'M', ENTRY}, {0, 0, 0}}; /* opset_import, metadata_props */

/* The operators that smallm exports; the last line is only in exports of earlier versions. No control flow, nothing random. */
static const char OPERATORS[] =
    " Add Cast Concat ConstantOfShape Div Expand Gather Greater GroupQueryAttention Less MatMul MatMulNBits Max Mul Or"
    " QuickGelu Range ReduceMean ReduceSum Reshape ScatterElements Shape Sigmoid SimplifiedLayerNormalization"
    " SkipSimplifiedLayerNormalization Slice Softmax Split Sqrt Squeeze Sub Tile Transpose Unsqueeze Where"
    " ArgMax Neg ";

enum { ONNX_FLOAT = 1, ONNX_UINT8 = 2, ONNX_INT64 = 7, ONNX_TYPES = 23 };
/* Bits of an element for each data type; 0 = unknown type. */
static const uint8_t BITS[ONNX_TYPES] = {0, 32, 8, 8, 16, 16, 32, 64, 0, 8, 16, 64, 32, 64, 0, 0, 16, 0, 0, 0, 0, 4, 4};

/* Reads a number of up to 64 bits, seven bits per byte. */
static bool varint(span *data, uint64_t *number)
{
    *number = 0;
    for (int shift = 0; shift < 70 && data->at < data->end; shift += 7) {
        uint8_t byte = *data->at++;
        if (shift == 63 && byte > 1) return false;
        *number |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80) return true;
    }
    return false;
}

/* 1 = a field was read, 0 = end of the message, -1 = not a protobuf message. */
static int next_field(span *data, field *f)
{
    uint64_t key, length;
    if (data->at == data->end) return 0;
    if (!varint(data, &key)) return -1;
    f->number = key >> 3, f->wire_type = (int)(key & 7), f->value = 0;
    f->bytes.at = f->bytes.end = data->at;
    switch (f->wire_type) {
    case 0: return varint(data, &f->value) ? 1 : -1;
    case 1: length = 8; break;
    case 5: length = 4; break;
    case 2:
        if (!varint(data, &length)) return -1;
        break;
    default: return -1;
    }
    if (length > size_of(*data)) return -1;
    f->bytes.at = data->at;
    f->bytes.end = data->at += length;
    return 1;
}

static bool are_varints(span data)
{
    uint64_t number;
    while (data.at < data.end)
        if (!varint(&data, &number)) return false;
    return true;
}

/* Whether the data are a message that follows these rules, nested messages included. */
static bool conforms(span data, const rule *rules)
{
    uint32_t seen = 0;
    field f;
    int more;
    while ((more = next_field(&data, &f)) == 1) {
        const rule *r = rules;
        while (r->number != 0 && r->number != f.number) r++;
        if (r->number == 0) return false;
        bool repeated = r->kind < 'a';
        if (!repeated && (seen & 1u << r->number) != 0) return false; /* readers treat repetition differently */
        seen |= 1u << r->number;
        switch (r->kind | 0x20) {
        case 'i':
            if (f.wire_type != 0 && !(repeated && f.wire_type == 2 && are_varints(f.bytes))) return false;
            break;
        case 'f':
            if (f.wire_type != 5 && !(repeated && f.wire_type == 2)) return false;
            break;
        default:
            if (f.wire_type != 2) return false;
            if ((r->kind | 0x20) == 's' && !is_text(f.bytes)) return false;
            if (r->inner != NULL && !conforms(f.bytes, r->inner)) return false;
        }
    }
    return more == 0;
}

/* The next field with this number in a message that conforms to its rules. */
static bool next_of(span *data, uint64_t number, field *f)
{
    while (next_field(data, f) == 1)
        if (f->number == number) return true;
    return false;
}

/* The field with this number; empty and 0 if it is missing. */
static field only(span message, uint64_t number)
{
    field f;
    if (next_of(&message, number, &f)) return f;
    memset(&f, 0, sizeof f);
    f.bytes.at = f.bytes.end = message.end;
    return f;
}

/* The number of bytes given by the shape and the type of a tensor; UINT64_MAX if they are not supported. 64 bits, also
   where size_t has 32: 2^30 elements of 8 bytes must not become 0. */
static uint64_t tensor_bytes(span tensor)
{
    int64_t type = (int64_t)only(tensor, 2).value;
    uint64_t elements = 1;
    int dimensions = 0;
    bool empty = false;
    field f;
    if (type < 0 || type >= ONNX_TYPES || BITS[type] == 0) return UINT64_MAX;
    for (span rest = tensor; next_of(&rest, 1, &f);) {
        do {
            uint64_t n = f.value;
            if (f.wire_type == 2 && (f.bytes.at == f.bytes.end || !varint(&f.bytes, &n))) break;
            if (n >= (uint64_t)1 << 31 || ++dimensions > MAX_DIMENSIONS) return UINT64_MAX;
            empty |= n == 0;
            elements = n != 0 && elements <= MAX_FILE ? elements * n : elements; /* a larger product is refused anyway */
        } while (f.wire_type == 2);
    }
    return empty ? 0 : elements > MAX_FILE ? UINT64_MAX : (elements * BITS[type] + 7) / 8;
}

static const char *tensor_problem(span tensor)
{
    field f;
    if (next_of(&(span){tensor.at, tensor.end}, 13, &f) || only(tensor, 14).value != 0)
        return "a tensor is stored in another file";
    if (tensor_bytes(tensor) != size_of(only(tensor, 9).bytes)) return "the data of a tensor do not match its shape";
    return NULL;
}

static bool is_operator(span name)
{
    char word[64];
    if (size_of(name) > 60) return false;
    int length = snprintf(word, sizeof word, " %.*s ", (int)size_of(name), (const char *)name.at);
    return length == (int)size_of(name) + 2 && length > 2 && strstr(OPERATORS, word) != NULL &&
           memchr(name.at, ' ', size_of(name)) == NULL;
}

static const char *node_problem(span node)
{
    span domain = only(node, 7).bytes;
    field attribute, tensor;
    if (!is_operator(only(node, 4).bytes) || !(is(domain, "") || is(domain, "ai.onnx") || is(domain, "com.microsoft")))
        return "it uses an operator that smallm models do not use";
    while (next_of(&node, 5, &attribute))
        if (next_of(&attribute.bytes, 5, &tensor)) {
            const char *problem = tensor_problem(tensor.bytes);
            if (problem != NULL) return problem;
        }
    return NULL;
}

/* A description of the first problem in a graph that conforms to its rules; NULL if there is no problem. */
static const char *graph_problem(span graph)
{
    const char *problem = NULL;
    int nodes = 0;
    field f;
    for (span rest = graph; problem == NULL && next_of(&rest, 1, &f);)
        problem = ++nodes > MAX_NODES ? "its graph is too large" : node_problem(f.bytes);
    for (span rest = graph; problem == NULL && next_of(&rest, 5, &f);) problem = tensor_problem(f.bytes);
    return problem;
}

/* -- the manifest -- */

/* The JSON value of a metadata key; false unless the key occurs exactly once. */
static bool metadata(span file, const char *key, span *json)
{
    field entry;
    int found = 0;
    while (next_of(&file, 14, &entry))
        if (is(only(entry.bytes, 1).bytes, key)) {
            *json = only(entry.bytes, 2).bytes;
            found++;
        }
    return found == 1;
}

static bool has_metadata(span file)
{
    field entry;
    while (next_of(&file, 14, &entry)) {
        span key = only(entry.bytes, 1).bytes;
        if (size_of(key) > 7 && memcmp(key.at, "smallm.", 7) == 0) return true;
    }
    return false;
}

static bool read_size(span file, const char *key, int32_t *value)
{
    span json;
    return metadata(file, key, &json) && json_size(json, value) && *value > 0;
}

/* Copies a string of the metadata; false if the value is not a string. *text is NULL if there is not enough memory. */
static bool read_text(span file, const char *key, uint8_t **text, size_t *bytes)
{
    span json;
    if (!metadata(file, key, &json)) return false;
    *text = calloc(size_of(json) + 1, 1);
    return *text == NULL || (json_string(&json, *text, bytes) && at_end(&json));
}

/* Default temperature, top_k, top_p and min_p. */
static bool read_sampling(smallm_model *model, span file)
{
    span json;
    double values[4] = {0.8, 0, 1, 0};
    if (metadata(file, "smallm.sampling", &json)) {
        static const char *const names[] = {"temperature", "top_k", "top_p", "min_p"};
        bool whole, first = true;
        if (!skip_char(&json, '{')) return false;
        while (!skip_char(&json, '}')) {
            uint8_t name[64];
            size_t bytes;
            double value;
            if (!first && !skip_char(&json, ',')) return false;
            skip_space(&json);
            span start = json;
            if (start.end - start.at > 60) start.end = start.at + 60; /* the size of `name` */
            if (!json_string(&start, name, &bytes)) return false;
            json.at = start.at;
            if (!skip_char(&json, ':') || !json_number(&json, &value, &whole)) return false;
            for (int i = 0; i < 4; i++)
                if (is(span_of(name, bytes), names[i])) {
                    if (i == 1 && !whole) return false;
                    values[i] = value;
                }
            first = false;
        }
        if (!at_end(&json)) return false;
    }
    model->temperature = values[0], model->top_p = values[2], model->min_p = values[3];
    if (!(values[0] >= 0 && values[0] <= MAX_SAMPLING && values[1] >= 0 && values[1] <= MAX_SAMPLING)) return false;
    model->top_k = (int64_t)values[1];
    return values[2] > 0 && values[2] <= 1 && values[3] >= 0 && values[3] <= 1;
}

/* The window and the base of RoPE; older files do not have these keys. */
static bool read_window(smallm_model *model, span file)
{
    span json;
    bool whole;
    model->window = 0, model->rope_theta = 10000;
    if (metadata(file, "smallm.window", &json) && !json_size(json, &model->window)) return false;
    if (metadata(file, "smallm.rope_theta", &json) &&
        !(json_number(&json, &model->rope_theta, &whole) && at_end(&json)))
        return false;
    return model->window <= model->block_size && model->rope_theta > 0 && model->rope_theta < 1e30 &&
           model->head_dim % 2 == 0;
}

static smallm_status read_vocabulary(smallm_model *model, span file)
{
    uint8_t *text = NULL;
    size_t bytes = 0;
    bool sane = read_text(file, "smallm.tokens", &text, &bytes);
    if (sane && text != NULL) {
        model->tokens = calloc(bytes / 3 + 2, sizeof *model->tokens);
        sane = model->tokens == NULL || read_tokens(span_of(text, bytes), model->tokens, &model->token_count);
    }
    bool enough = text != NULL && model->tokens != NULL && (!sane || sort_tokens(model));
    sane = sane && (!enough || is_vocabulary(model));
    free(text);
    if (!sane || (enough && model->token_count + 256 != (size_t)model->vocab_size)) return broken_metadata(model);
    return enough ? SMALLM_OK : no_memory(model->error);
}

/* The number of ids of a text. */
static size_t count_ids(const smallm_model *model, span text)
{
    size_t count = 0;
    int32_t ids[4];
    for (int length; (length = character_length(text)) > 0; text.at += length)
        count += (size_t)spell(model, text.at, length, ids);
    return count;
}

static smallm_status read_manifest(smallm_model *model, span file)
{
    span json;
    int32_t version = 0;
    if (!has_metadata(file)) return bad_model(model, "it has no smallm metadata");
    if (!metadata(file, "smallm.format_version", &json) || !json_size(json, &version) || version != FORMAT_VERSION)
        return fail(model->error, SMALLM_BAD_MODEL, "%s has another format version; this smallm.c reads %d: export the model "
                    "again, or use the smallm.c of the smallm version that wrote it", model->name, FORMAT_VERSION);
    bool sane = read_size(file, "smallm.block_size", &model->block_size) &&
                read_size(file, "smallm.n_layer", &model->n_layer) &&
                read_size(file, "smallm.n_head", &model->n_head) &&
                read_size(file, "smallm.n_kv_head", &model->n_kv_head) &&
                read_size(file, "smallm.n_embd", &model->n_embd) &&
                read_size(file, "smallm.head_dim", &model->head_dim) &&
                read_size(file, "smallm.vocab_size", &model->vocab_size);
    if (!sane || model->n_layer > MAX_LAYERS || model->n_head % model->n_kv_head != 0 || !read_window(model, file) ||
        !read_sampling(model, file))
        return broken_metadata(model);
    smallm_status status = read_vocabulary(model, file);
    if (status != SMALLM_OK) return status;
    if (!read_text(file, "smallm.start_text", &model->start_text, &model->start_bytes)) return broken_metadata(model);
    if (model->start_text == NULL) return no_memory(model->error);
    span start = span_of(model->start_text, model->start_bytes);
    size_t ids = is_text(start) ? count_ids(model, start) : 0;
    return ids >= 1 && ids <= MAX_START_IDS ? SMALLM_OK : broken_metadata(model);
}

/* Refuses a model that would need far more memory than the size of its file justifies: an element of the embedding takes
   at least half a byte in the file, a position of the RoPE tables one byte per channel. */
static smallm_status check_size(smallm_model *model, size_t file_bytes)
{
    uint64_t file = file_bytes, block_size = (uint64_t)model->block_size, head_dim = (uint64_t)model->head_dim;
    double cache = 8.0 * model->n_layer * model->n_kv_head * model->head_dim * model->block_size; /* bytes */
    if ((uint64_t)model->vocab_size * (uint64_t)model->n_embd / 2 <= file && block_size * head_dim <= file &&
        cache <= MAX_SMALL_CACHE + 64.0 * (double)file && cache <= (double)(SIZE_MAX / 2))
        return SMALLM_OK;
    return fail(model->error, SMALLM_BAD_MODEL, "%s is too small for the sizes in its metadata; export the model again",
                model->name);
}

/* Adler-32 (RFC 1950): a is 1 plus the sum of the bytes, b the sum of all values of a. Up to 4096 bytes, whose sums fit in
   32 bits, are added in 16 columns, which compilers turn into vectors. */
static uint32_t adler32(span data)
{
    uint32_t a = 1, b = 0;
    while (size_of(data) >= 16) {
        uint32_t sum[16] = {0}, sums[16] = {0}, rows = size_of(data) / 16 < 256 ? (uint32_t)(size_of(data) / 16) : 256;
        for (uint32_t r = 0; r < rows; r++, data.at += 16)
            for (int i = 0; i < 16; i++) sums[i] += sum[i], sum[i] += data.at[i];
        b += 16 * rows * a;
        for (uint32_t i = 0; i < 16; i++) b += 16 * sums[i] + (16 - i) * sum[i], a += sum[i];
        a %= 65521, b %= 65521;
    }
    while (data.at < data.end) b += a += *data.at++;
    return b % 65521 << 16 | a % 65521;
}

static smallm_status check_checksum(smallm_model *model, span file, span graph)
{
    span json;
    double wanted;
    bool whole;
    if (!metadata(file, "smallm.checksum", &json)) return SMALLM_OK; /* an export of an earlier version */
    if (!json_number(&json, &wanted, &whole) || !at_end(&json) || !whole || wanted < 0 || wanted > UINT32_MAX)
        return broken_metadata(model);
    if (wanted == 0 || wanted == adler32(graph)) return SMALLM_OK;
    return fail(model->error, SMALLM_BAD_MODEL, "%s is damaged: it does not match its checksum; copy it again, or export it "
                "again", model->name);
}

/* The number of an input or output: 0 to 3, then key and value of the past of each layer, then those of the present;
   -1 for other names. */
static int value_number(span name, int n_layer)
{
    static const char *const plain[] = {"input_ids", "attention_mask", "num_logits_to_keep", "logits"};
    static const char *const sides[] = {"past_key_values.", "present."};
    for (int i = 0; i < 4; i++)
        if (is(name, plain[i])) return i;
    for (int side = 0; side < 2; side++) {
        size_t length = strlen(sides[side]);
        if (size_of(name) <= length || memcmp(name.at, sides[side], length) != 0) continue;
        span rest = {name.at + length, name.end};
        int layer = 0, digits = 0;
        for (; rest.at < rest.end && *rest.at >= '0' && *rest.at <= '9' && digits < 3; rest.at++, digits++)
            layer = layer * 10 + (*rest.at - '0');
        bool whole = digits > 0 && layer < n_layer && (digits == 1 || layer >= (digits == 2 ? 10 : 100));
        if (whole && is(rest, ".key")) return 4 + 2 * (side * n_layer + layer);
        if (whole && is(rest, ".value")) return 5 + 2 * (side * n_layer + layer);
    }
    return -1;
}

/* Whether an input or output has the type and the fixed dimensions that its number requires. */
static bool is_expected(const smallm_model *model, span value, int number)
{
    span type = only(only(value, 2).bytes, 1).bytes, shape = only(type, 2).bytes;
    int32_t wanted[2] = {model->vocab_size, 0};
    int count = number < 3 ? 0 : number == 3 ? 1 : 2, found = 0;
    field dimension, fixed;
    if (number > 3) wanted[0] = model->n_kv_head, wanted[1] = model->head_dim;
    while (next_of(&shape, 1, &dimension))
        if (next_of(&dimension.bytes, 1, &fixed))
            if (found == count || fixed.value != (uint64_t)wanted[found++]) return false;
    return found == count && only(type, 1).value == (number < 3 ? ONNX_INT64 : ONNX_FLOAT);
}

static smallm_status check_values(smallm_model *model, span graph)
{
    uint8_t seen[4 + 4 * MAX_LAYERS] = {0};
    int count = 0;
    bool sane = true;
    for (uint64_t side = 11; side <= 12; side++) { /* inputs, outputs */
        field value;
        for (span rest = graph; sane && next_of(&rest, side, &value);) {
            int number = value_number(only(value.bytes, 1).bytes, model->n_layer);
            sane = number >= 0 && !seen[number] && is_expected(model, value.bytes, number);
            if (sane) seen[number] = 1, count++;
        }
    }
    if (sane && count == 4 + 4 * model->n_layer) return SMALLM_OK;
    return fail(model->error, SMALLM_BAD_MODEL, "%s: inputs and outputs do not match its metadata; export the model again",
                model->name);
}

/* Copies the metadata entries of the file. */
static smallm_status copy_metadata(smallm_model *model, span file)
{
    field f;
    size_t room = 0;
    for (span rest = file; next_field(&rest, &f) == 1;) room += f.number == 14 ? size_of(f.bytes) + 12 : 0;
    model->metadata = malloc(room + 1);
    if (model->metadata == NULL) return no_memory(model->error);
    for (span rest = file, before = rest; next_field(&rest, &f) == 1; before = rest) {
        if (f.number != 14) continue;
        span entry = {before.at, rest.at}; /* with its key and length */
        memcpy(model->metadata + model->metadata_bytes, entry.at, size_of(entry));
        model->metadata_bytes += size_of(entry);
    }
    return SMALLM_OK;
}

/* Checks the content of the file and reads its manifest. */
static smallm_status read_model(smallm_model *model, span file)
{
    if (size_of(file) == 0 || !conforms(file, MODEL))
        return fail(model->error, SMALLM_BAD_MODEL, "%s is truncated or not an ONNX model; export the model again",
                    model->name);
    span graph = only(file, 7).bytes;
    const char *problem = size_of(graph) == 0 ? "it has no graph" : graph_problem(graph);
    if (problem != NULL) return bad_model(model, problem);
    smallm_status status = read_manifest(model, file);
    if (status == SMALLM_OK) status = check_checksum(model, file, graph);
    if (status == SMALLM_OK) status = check_size(model, size_of(file));
    if (status == SMALLM_OK) status = check_values(model, graph);
    return status == SMALLM_OK ? copy_metadata(model, file) : status;
}

/* -- the weights: initialisers of the graph, found by their names -- */

typedef struct {
    span name, tensor;
} initializer;

typedef struct {
    smallm_model *model;
    span graph;
    initializer *items; /* sorted by name */
    size_t count;
} weight_file;

/* Zeroed memory that the model owns; NULL if there is not enough. */
static void *reserve(smallm_model *model, size_t count, size_t size)
{
    if (model->allocation_count == model->allocation_room) {
        size_t room = 2 * model->allocation_room + 16;
        void **more = realloc(model->allocations, room * sizeof *more);
        if (more == NULL) return NULL;
        model->allocations = more, model->allocation_room = room;
    }
    void *memory = allocate(count, size);
    if (memory != NULL) model->allocations[model->allocation_count++] = memory;
    return memory;
}

static int compare_names(const void *a, const void *b)
{
    span x = ((const initializer *)a)->name, y = ((const initializer *)b)->name;
    size_t length = size_of(x) < size_of(y) ? size_of(x) : size_of(y);
    int order = length > 0 ? memcmp(x.at, y.at, length) : 0;
    return order != 0 ? order : (size_of(x) > size_of(y)) - (size_of(x) < size_of(y));
}

static smallm_status list_initializers(weight_file *w)
{
    field f;
    for (span rest = w->graph; next_of(&rest, 5, &f);) w->count++;
    if (w->count > MAX_NODES) return bad_model(w->model, "its graph is too large");
    w->items = calloc(w->count + 1, sizeof *w->items);
    if (w->items == NULL) return no_memory(w->model->error);
    size_t i = 0;
    for (span rest = w->graph; next_of(&rest, 5, &f); i++)
        w->items[i] = (initializer){only(f.bytes, 8).bytes, f.bytes};
    qsort(w->items, w->count, sizeof *w->items, compare_names);
    for (i = 1; i < w->count; i++)
        if (compare_names(&w->items[i - 1], &w->items[i]) == 0) return other_graph(w->model, "weights");
    return SMALLM_OK;
}

/* The data of an initialiser "h.<layer>.<name>", or "<name>" if layer is -1, and its shape, to which ones are added up to
   three dimensions. An empty span with a shape of zeros if it is missing or has another type. */
static span find_weight(const weight_file *w, int layer, const char *name, uint64_t type, uint64_t shape[3])
{
    char full[64];
    span none = {w->graph.end, w->graph.end};
    int length = layer < 0 ? snprintf(full, sizeof full, "%s", name) : snprintf(full, sizeof full, "h.%d.%s", layer, name);
    initializer wanted = {span_of(full, (size_t)length), none};
    const initializer *found = bsearch(&wanted, w->items, w->count, sizeof *w->items, compare_names);
    shape[0] = shape[1] = shape[2] = 0;
    if (found == NULL || only(found->tensor, 2).value != type) return none;
    uint64_t dimensions[3] = {1, 1, 1};
    int count = 0;
    field f;
    for (span rest = found->tensor; next_of(&rest, 1, &f);) {
        do {
            uint64_t n = f.value;
            if (f.wire_type == 2 && (f.bytes.at == f.bytes.end || !varint(&f.bytes, &n))) break;
            if (count == 3) return none;
            dimensions[count++] = n;
        } while (f.wire_type == 2);
    }
    memcpy(shape, dimensions, sizeof dimensions);
    return only(found->tensor, 9).bytes; /* graph_problem has checked that its size is that of the shape */
}

static float float_at(span data, size_t index)
{
    float value;
    memcpy(&value, data.at + index * sizeof value, sizeof value);
    return value;
}

/* Looks at 16 numbers at a time, which compilers turn into vectors: whether all bits of their exponent are 1. */
static bool are_finite(span data)
{
    enum { EXPONENT = 0x7F800000 };
    uint32_t bits[16], found[16] = {0};
    for (; size_of(data) >= sizeof bits; data.at += sizeof bits) {
        memcpy(bits, data.at, sizeof bits);
        for (int i = 0; i < 16; i++) found[i] |= (bits[i] & EXPONENT) == EXPONENT;
    }
    for (; size_of(data) >= sizeof(float); data.at += sizeof(float)) found[0] |= !isfinite(float_at(data, 0));
    for (int i = 1; i < 16; i++) found[0] |= found[i];
    return found[0] == 0;
}

/* A copy of floats (rows, columns). */
static smallm_status read_rows(const weight_file *w, int layer, const char *name, size_t rows, size_t columns,
                               const float **to)
{
    uint64_t shape[3];
    span data = find_weight(w, layer, name, ONNX_FLOAT, shape);
    bool flat = rows == 1 && shape[0] == columns && shape[1] == 1;
    if (!flat && !(shape[0] == rows && shape[1] == columns)) return other_graph(w->model, name);
    if (shape[2] != 1) return other_graph(w->model, name);
    if (!are_finite(data)) return not_finite(w->model->error);
    float *copy = reserve(w->model, rows * columns, sizeof *copy);
    if (copy == NULL) return no_memory(w->model->error);
    memcpy(copy, data.at, rows * columns * sizeof *copy);
    *to = copy;
    return SMALLM_OK;
}

/* Where an output of a matrix goes: groups of `group` outputs begin at multiples of 16. */
static size_t padded_output(size_t output, size_t group)
{
    return output / group * ((group + 15) / 16 * 16) + output % group;
}

/* A matrix in fp32 from (inputs, outputs), or from (outputs, inputs) if `rows_are_outputs`. */
static smallm_status pack_floats(const weight_file *w, span data, bool rows_are_outputs, size_t group, matrix *m)
{
    if (!are_finite(data)) return not_finite(w->model->error);
    m->panels = padded_output(m->outputs - 1, group) / 16 + 1;
    float *values = reserve(w->model, m->panels * m->inputs * 16, sizeof *values);
    if (values == NULL) return no_memory(w->model->error);
    for (size_t n = 0, run; n < m->outputs; n += run) { /* outputs of one panel, which are adjacent */
        size_t to = padded_output(n, group), left = group - n % group;
        float *panel = values + to / 16 * m->inputs * 16 + to % 16;
        run = left < 16 - to % 16 ? left : 16 - to % 16;
        if (run > m->outputs - n) run = m->outputs - n;
        for (size_t k = 0; k < m->inputs; k++, panel += 16)
            if (rows_are_outputs)
                for (size_t i = 0; i < run; i++) panel[i] = float_at(data, (n + i) * m->inputs + k);
            else
                memcpy(panel, data.at + (k * m->outputs + n) * sizeof *panel, run * sizeof *panel);
    }
    m->values = values;
    return SMALLM_OK;
}

/* The bits and the block of the MatMulNBits node that reads these codes; false if no such node exists, or if its other
   inputs differ. */
static bool find_quantisation(const weight_file *w, int layer, const char *name, uint64_t *bits, uint64_t *block,
                              const matrix *m)
{
    char full[64];
    field node, input, attribute;
    if (layer < 0) snprintf(full, sizeof full, "%s.codes", name);
    else snprintf(full, sizeof full, "h.%d.%s.codes", layer, name);
    for (span rest = w->graph; next_of(&rest, 1, &node);) {
        span inputs = node.bytes, attributes = node.bytes;
        if (!is(only(node.bytes, 4).bytes, "MatMulNBits")) continue;
        if (!next_of(&inputs, 1, &input) || !next_of(&inputs, 1, &input) || !is(input.bytes, full)) continue;
        uint64_t K = 0, N = 0;
        *bits = *block = 0;
        while (next_of(&attributes, 5, &attribute)) {
            span key = only(attribute.bytes, 1).bytes;
            uint64_t value = only(attribute.bytes, 3).value;
            if (is(key, "bits")) *bits = value;
            if (is(key, "block_size")) *block = value;
            if (is(key, "K")) K = value;
            if (is(key, "N")) N = value;
        }
        return K == m->inputs && N == m->outputs;
    }
    return false;
}

/* Writes a block of the codes of an output, of 8 or 4 bits, of which the first `used` count, for a panel: four codes at
   every 64th byte. Returns their sum. */
static int32_t unpack_codes(const uint8_t *codes, bool bytes, size_t block, size_t used, int8_t *to)
{
    int32_t sum = 0;
    for (size_t k = 0; k < block; k += 4, to += 64) {
        int8_t four[4];
        if (bytes)
            for (size_t i = 0; i < 4; i++) four[i] = (int8_t)(codes[k + i] - 128);
        else
            for (size_t i = 0; i < 4; i++) four[i] = (int8_t)((codes[(k + i) / 2] >> i % 2 * 4 & 15) - 8);
        for (size_t i = 0; i < 4; i++) {
            if (k + i >= used) four[i] = 0;
            sum += four[i];
        }
        memcpy(to, four, sizeof four);
    }
    return sum;
}

/* A quantised matrix; codes of 4 bits become codes of 8. */
static smallm_status pack_codes(const weight_file *w, int layer, const char *name, size_t group, matrix *m)
{
    char part[48];
    uint64_t shape[3], scale_shape[3], bits, block;
    smallm_model *model = w->model;
    snprintf(part, sizeof part, "%s.codes", name);
    span codes = find_weight(w, layer, part, ONNX_UINT8, shape);
    snprintf(part, sizeof part, "%s.scales", name);
    span scales = find_weight(w, layer, part, ONNX_FLOAT, scale_shape);
    if (!find_quantisation(w, layer, name, &bits, &block, m) || !(bits == 8 || bits == 4) || block < 16 ||
        block > 4096 || block % 16 != 0 || shape[0] != m->outputs || shape[2] != block * bits / 8)
        return other_graph(model, name);
    m->block = (size_t)block, m->blocks = m->stride = (m->inputs + m->block - 1) / m->block;
    if (shape[1] != m->blocks || size_of(scales) != m->outputs * m->blocks * sizeof(float)) return other_graph(model, name);
    if (!are_finite(scales)) return not_finite(model->error);
    m->panels = padded_output(m->outputs - 1, group) / 16 + 1;
    size_t row = m->blocks * m->block;
    int8_t *to_codes = reserve(model, m->panels * row * 16, 1);
    float *to_scales = reserve(model, m->panels * m->blocks * 16, sizeof *to_scales);
    int32_t *corrections = reserve(model, m->panels * m->blocks * 16, sizeof *corrections);
    if (to_codes == NULL || to_scales == NULL || corrections == NULL) return no_memory(model->error);
    for (size_t n = 0; n < m->outputs; n++) {
        size_t to = padded_output(n, group), panel = to / 16, lane = to % 16;
        const uint8_t *from = codes.at + n * row * (size_t)bits / 8;
        for (size_t b = 0; b < m->blocks; b++) {
            size_t column = (panel * m->blocks + b) * 16 + lane, rest = m->inputs - b * m->block;
            int8_t *column_codes = to_codes + ((panel * row + b * m->block) * 16 + lane * 4);
            int32_t sum = unpack_codes(from + b * m->block * (size_t)bits / 8, bits == 8, m->block,
                                       rest < m->block ? rest : m->block, column_codes);
            corrections[column] = -128 * sum;
            to_scales[column] = float_at(scales, n * m->blocks + b);
        }
    }
    m->codes = to_codes, m->scales = to_scales, m->corrections = corrections;
    if (row > model->max_codes) model->max_codes = row;
    if (m->blocks > model->max_blocks) model->max_blocks = m->blocks;
    return SMALLM_OK;
}

static smallm_status read_matrix(const weight_file *w, int layer, const char *name, size_t inputs, size_t outputs,
                                 size_t group, matrix *m)
{
    char part[48];
    uint64_t shape[3];
    m->inputs = inputs, m->outputs = outputs;
    snprintf(part, sizeof part, "%s.weight_t", name);
    span data = find_weight(w, layer, part, ONNX_FLOAT, shape);
    if (shape[0] != 0)
        return shape[0] == inputs && shape[1] == outputs && shape[2] == 1
                   ? pack_floats(w, data, false, group, m) : other_graph(w->model, name);
    return pack_codes(w, layer, name, group, m);
}

/* The number of inner units of the feed-forward part, from the shape of its last matrix; 0 if that is missing. */
static size_t inner_units(const weight_file *w)
{
    uint64_t shape[3];
    find_weight(w, 0, "mlp.c_proj.weight_t", ONNX_FLOAT, shape);
    if (shape[0] != 0) return shape[0] < MAX_SIZE ? (size_t)shape[0] : 0;
    find_weight(w, 0, "mlp.c_fc.codes", ONNX_UINT8, shape);
    return shape[0] < 2 * MAX_SIZE ? (size_t)shape[0] / 2 : 0;
}

/* Whether the nodes are those of export/graph.py in the attributes that the forward pass takes for granted. */
static bool is_known_graph(const smallm_model *model, span graph)
{
    field node, attribute;
    int attentions = 0, norms = 0, gates = 0;
    while (next_of(&graph, 1, &node)) {
        span kind = only(node.bytes, 4).bytes, attributes = node.bytes;
        bool attention = is(kind, "GroupQueryAttention"), gate = is(kind, "QuickGelu");
        bool norm = is(kind, "SimplifiedLayerNormalization") || is(kind, "SkipSimplifiedLayerNormalization");
        attentions += attention, gates += gate, norms += norm;
        while (next_of(&attributes, 5, &attribute)) {
            span key = only(attribute.bytes, 1).bytes, number = only(attribute.bytes, 2).bytes;
            int64_t value = (int64_t)only(attribute.bytes, 3).value;
            float real = size_of(number) == sizeof real ? float_at(number, 0) : 0;
            if (norm && is(key, "epsilon") && real != 1e-6f) return false;
            if (gate && is(key, "alpha") && real != 1.0f) return false;
            if (!attention) continue;
            if (is(key, "scale") && real != 1.0f) return false;
            if (is(key, "num_heads") && value != model->n_head) return false;
            if (is(key, "kv_num_heads") && value != model->n_kv_head) return false;
            if (is(key, "local_window_size") && value != (model->window > 0 ? model->window : -1)) return false;
            if ((is(key, "rotary_interleaved") || is(key, "softcap") || is(key, "smooth_softmax")) &&
                (value != 0 || real != 0))
                return false;
        }
    }
    return attentions == model->n_layer && gates == model->n_layer && norms >= 2 * model->n_layer;
}

static smallm_status read_layer(weight_file *w, int i)
{
    smallm_model *m = w->model;
    layer *l = &m->layers[i];
    size_t C = (size_t)m->n_embd, width = (size_t)m->head_dim;
    if (i > 0 || m->table == NULL) {
        TRY(read_rows(w, i, "ln_1.weight", 1, C, &l->ln_1));
        TRY(read_rows(w, i, "attn.qk_gain", (size_t)(m->n_head + m->n_kv_head), width, &l->qk_gain));
        TRY(read_matrix(w, i, "attn.c_attn", C, m->heads * width, 16, &l->qkv));
    }
    TRY(read_matrix(w, i, "attn.c_proj", (size_t)m->n_head * width, C, 16, &l->attention_out));
    TRY(read_rows(w, i, "ln_2.weight", 1, C, &l->ln_2));
    TRY(read_matrix(w, i, "mlp.c_fc", C, 2 * m->inner, m->inner, &l->gate_up));
    return read_matrix(w, i, "mlp.c_proj", m->inner, C, 16, &l->down);
}

static smallm_status read_all(weight_file *w)
{
    smallm_model *m = w->model;
    uint64_t shape[3];
    size_t V = (size_t)m->vocab_size, C = (size_t)m->n_embd, half = (size_t)m->head_dim / 2, T = (size_t)m->block_size;
    if (!is_known_graph(m, w->graph)) return other_graph(m, "nodes");
    TRY(list_initializers(w));
    if ((m->inner = inner_units(w)) == 0) return other_graph(m, "feed-forward part");
    m->heads = (size_t)(m->n_head + 2 * m->n_kv_head);
    if (m->head_dim % 16 != 0 || C % 16 != 0) return other_graph(m, "size of the heads");
    m->padded_inner = (m->inner + 15) / 16 * 16, m->padded_vocab = (V + 15) / 16 * 16;
    m->positions = (T + VALUE_BLOCK - 1) / VALUE_BLOCK * VALUE_BLOCK;
    bool small = (m->heads * (size_t)m->head_dim + (size_t)m->n_head * (size_t)m->head_dim + 3 * m->inner) * C <= SMALL_LAYER;
    m->rows = small ? MAX_ROWS / 2 : MAX_ROWS;
    m->layers = reserve(m, (size_t)m->n_layer, sizeof *m->layers);
    if (m->layers == NULL) return no_memory(m->error);
    TRY(read_rows(w, -1, "wte.weight", V, C, &m->embedding));
    TRY(read_rows(w, -1, "cos_cache", T, half, &m->cos));
    TRY(read_rows(w, -1, "sin_cache", T, half, &m->sin));
    TRY(read_rows(w, -1, "ln_f.weight", 1, C, &m->ln_f));
    find_weight(w, -1, "qkv_table", ONNX_FLOAT, shape);
    if (shape[0] != 0)
        TRY(read_rows(w, -1, "qkv_table", V, m->heads * (size_t)m->head_dim, &m->table));
    for (int i = 0; i < m->n_layer; i++) TRY(read_layer(w, i));
    m->head.inputs = C, m->head.outputs = V;
    find_weight(w, -1, "wte.codes", ONNX_UINT8, shape);
    if (shape[0] != 0) return pack_codes(w, -1, "wte", 16, &m->head);
    return pack_floats(w, find_weight(w, -1, "wte.weight", ONNX_FLOAT, shape), true, 16, &m->head);
}

/* Computes the rotation of keys that move from the end of a full cache to its beginning. */
static smallm_status prepare_rotation(smallm_model *model)
{
    int32_t half = model->head_dim / 2, moved = model->block_size - (model->window - 1);
    model->rotation = reserve(model, (size_t)model->head_dim, sizeof *model->rotation);
    if (model->rotation == NULL) return no_memory(model->error);
    for (int32_t i = 0; i < half; i++) {
        double y = logarithm(model->rope_theta) * i / half, angle = moved * (y < 0 ? 1 / exponential(y) : exponential(-y));
        cosine_and_sine(angle, &model->rotation[i], &model->rotation[half + i]);
    }
    return SMALLM_OK;
}

/* Quantised models have a KV cache of 8 bits. Not with a window: each slide would rotate the keys and round them again. */
static smallm_status prepare_cache(smallm_model *model)
{
    size_t T = model->positions, width = (size_t)model->head_dim, sums = T / VALUE_BLOCK * width;
    model->cache_part = T * width;
    if (model->max_codes == 0 || model->window > 0) return SMALLM_OK;
    model->cache_part = T * width / 4 + T + (sums > T ? sums : T);
    model->ones = reserve(model, sums, sizeof *model->ones);
    if (model->ones == NULL) return no_memory(model->error);
    for (size_t i = 0; i < sums; i++) model->ones[i] = 1;
    return SMALLM_OK;
}

static smallm_status read_weights(smallm_model *model, span file)
{
    weight_file w = {model, only(file, 7).bytes, NULL, 0};
    smallm_status status = read_all(&w);
    free(w.items);
    TRY(status);
    TRY(prepare_cache(model));
    return model->window > 0 ? prepare_rotation(model) : SMALLM_OK;
}

/* -- instruction sets -- */

/* Fetches some of the lines of 64 bytes of a panel into the second cache. */
static INLINE void fetch(const void *panel, size_t lines, size_t from, size_t count)
{
#if defined(__GNUC__)
    for (size_t i = from; i < from + count && i < lines; i++) __builtin_prefetch((const char *)panel + 64 * i, 0, 2);
#else
    (void)panel, (void)lines, (void)from, (void)count;
#endif
}

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(_MSC_VER) /* Clang with the headers and libraries of MSVC lacks what this needs */
#define SMALLM_AVX 1
#define SUFFIX avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define SMALLM_AVX512 1
#include "smallm_kernels.h"
#undef SMALLM_AVX512
#undef TARGET
#undef SUFFIX
#define SUFFIX avx2
#define TARGET __attribute__((target("avx2")))
#define SMALLM_AVX2 1
#include "smallm_kernels.h"
#undef SMALLM_AVX2
#undef TARGET
#undef SUFFIX
#endif
#define SUFFIX sse2
#define TARGET
#define SMALLM_SSE2 1
#include "smallm_kernels.h"
#undef SMALLM_SSE2
#undef TARGET
#undef SUFFIX
#elif defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>
#define SUFFIX neon
#define TARGET
#define SMALLM_NEON 1
#include "smallm_kernels.h"
#undef SMALLM_NEON
#undef TARGET
#undef SUFFIX
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#define SUFFIX wasm
#define TARGET
#define SMALLM_WASM 1
#include "smallm_kernels.h"
#undef SMALLM_WASM
#undef TARGET
#undef SUFFIX
#endif
#if !defined(__wasm_simd128__) /* whose module is to be small */
#define SUFFIX plain
#define TARGET
#include "smallm_kernels.h"
#undef TARGET
#undef SUFFIX
#endif

/* Chooses the fastest kernels of this processor, or those with the given name; false if it does not have them. */
static bool choose_kernels(smallm_model *model, const char *name)
{
    struct { const char *name; const kernels *kernels; bool there; } known[] = {
#if SMALLM_AVX
        {"avx512", &KERNELS_avx512, __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                                    __builtin_cpu_supports("avx512vl")},
        {"avx2", &KERNELS_avx2, __builtin_cpu_supports("avx2") != 0},
#endif
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
        {"sse2", &KERNELS_sse2, true},
#elif defined(__aarch64__) || defined(_M_ARM64)
        {"neon", &KERNELS_neon, true},
#elif defined(__wasm_simd128__)
        {"wasm", &KERNELS_wasm, true},
#endif
#if !defined(__wasm_simd128__)
        {"plain", &KERNELS_plain, true},
#endif
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].there && (name == NULL || strcmp(name, known[i].name) == 0)) {
            model->kernels = known[i].kernels, model->kernel_name = known[i].name;
            return true;
        }
    return false;
}

/* -- the forward pass -- */

/* Some ids that follow those in the cache of a context. */
typedef struct {
    smallm_context *context;
    const int32_t *ids;
    size_t count, position; /* position of the first id */
} segment;

/* The first of the items that a part of a task computes. */
static size_t first_item(size_t items, size_t part, size_t parts) { return items * part / parts; }

/* A product whose inputs have been rounded if the matrix is quantised. */
typedef struct {
    const smallm_context *context;
    const matrix *w;
    const float *x;
    float *y;
    size_t x_stride, rows, y_stride;
} product_task;

/* Computes a part of the panels. */
static void multiply_part(const void *task, size_t part, size_t parts)
{
    const product_task *t = task;
    const kernels *k = t->context->model->kernels;
    matrix w = *t->w;
    size_t groups = (w.panels + PANELS_TOGETHER - 1) / PANELS_TOGETHER, row = w.blocks * w.block;
    size_t from = first_item(groups, part, parts) * PANELS_TOGETHER;
    size_t end = first_item(groups, part + 1, parts) * PANELS_TOGETHER;
    float *y = t->y + 16 * from;
    w.panels = (end < w.panels ? end : w.panels) - from;
    if (w.values != NULL) {
        k->product(t->x, t->x_stride, t->rows, w.values + from * w.inputs * 16, w.inputs * 16, w.inputs, w.panels, y,
                   t->y_stride);
        return;
    }
    w.codes += from * w.stride * w.block * 16, w.scales += from * w.stride * 16, w.corrections += from * w.stride * 16;
    k->product8(t->context->codes, t->context->code_scales, row, t->rows, &w, y, t->y_stride);
}

static void multiply(const smallm_model *m, smallm_context *c, const matrix *w, const float *x, size_t x_stride,
                     size_t rows, float *y, size_t y_stride)
{
    product_task task = {c, w, x, y, x_stride, rows, y_stride};
    for (size_t r = 0; r < rows && w->values == NULL; r++)
        m->kernels->quantise(x + r * x_stride, w->inputs, w->blocks, w->block, c->codes + r * w->blocks * w->block,
                             c->code_scales + r * w->blocks);
    share(c->pool, multiply_part, &task, w->panels / PANELS_TOGETHER);
}

/* Rotates a query or key to its position (RoPE, Su et al. 2021): channel i with channel i + half. */
static void rotate(const smallm_model *m, float *x, size_t position)
{
    size_t half = (size_t)m->head_dim / 2;
    const float *cosine = m->cos + position * half, *sine = m->sin + position * half;
    for (size_t i = 0; i < half; i++) {
        float low_cos = x[i] * cosine[i], high_sin = x[half + i] * sine[i];
        float high_cos = x[half + i] * cosine[i], low_sin = x[i] * sine[i];
        x[i] = low_cos - high_sin;
        x[half + i] = high_cos + low_sin;
    }
}

/* The keys and values of a layer and a key/value head. */
static float *keys_of(const smallm_model *m, smallm_context *c, size_t layer, size_t head)
{
    return c->keys + (layer * (size_t)m->n_kv_head + head) * m->cache_part;
}

static float *values_of(const smallm_model *m, smallm_context *c, size_t layer, size_t head)
{
    return c->values + (layer * (size_t)m->n_kv_head + head) * m->cache_part;
}

static cache8 cache8_of(const smallm_model *m, smallm_context *c, size_t layer, size_t head)
{
    float *keys = keys_of(m, c, layer, head), *values = values_of(m, c, layer, head);
    size_t T = m->positions, codes = T * (size_t)m->head_dim / 4; /* floats that take as much memory */
    cache8 k = {(int8_t *)keys, (int8_t *)values, keys + codes, values + codes,
                (int32_t *)(void *)(keys + codes + T), (int32_t *)(void *)(values + codes + T)};
    return k;
}

/* The memory for the attention of a head, which each thread has. */
typedef struct {
    float *scores, *mixed; /* (MAX_ROWS, positions), (MAX_ROWS, head_dim) */
    int8_t *codes;         /* (MAX_ROWS, positions or head_dim) */
    float *scales;
} buffers;

/* Writes a key and a value into a cache of 8 bits. */
static void store8(const smallm_model *m, const cache8 *k, const buffers *b, const float *key, const float *value,
                   size_t position)
{
    size_t width = (size_t)m->head_dim, T = m->positions;
    int8_t *keys = k->keys + position / 16 * width * 16 + position % 16 * 4;
    int8_t *values = k->values + position / 4 * 64 + position % 4;
    int32_t *corrections = k->value_corrections + position / VALUE_BLOCK * 16, sum = 0;
    m->kernels->quantise(key, width, 1, width, b->codes, k->key_scales + position);
    for (size_t i = 0; i < width; i += 4) memcpy(keys + 16 * i, b->codes + i, 4);
    for (size_t i = 0; i < width; i++) sum += b->codes[i];
    k->key_corrections[position] = -128 * sum;
    m->kernels->quantise(value, width, 1, width, b->codes, k->value_scales + position);
    for (size_t p = 0; p < width; p += 16, values += T * 16, corrections += T / VALUE_BLOCK * 16)
        for (size_t i = 0; i < 16; i++) {
            corrections[i] += 128 * (values[4 * i] - b->codes[p + i]); /* the code that is replaced, and the new one */
            values[4 * i] = b->codes[p + i];
        }
}

/* Normalises and rotates the queries and the key of a key/value head, and writes key and value into the cache. */
static void store(const smallm_model *m, smallm_context *c, const buffers *b, size_t layer, size_t head, float *packed,
                  size_t position)
{
    size_t width = (size_t)m->head_dim, group = (size_t)(m->n_head / m->n_kv_head);
    const float *gain = m->layers[layer].qk_gain, *key = packed + ((size_t)m->n_head + head) * width;
    const float *value = key + (size_t)m->n_kv_head * width;
    for (size_t i = 0; i <= group; i++) {
        size_t h = i < group ? head * group + i : (size_t)m->n_head + head;
        float *x = packed + h * width;
        if (gain != NULL) m->kernels->norm(x, gain + h * width, x, width); /* the table of the first layer is normalised */
        rotate(m, x, position);
    }
    if (m->ones != NULL) {
        cache8 k = cache8_of(m, c, layer, head);
        store8(m, &k, b, key, value, position);
        return;
    }
    float *keys = keys_of(m, c, layer, head) + position / 16 * width * 16 + position % 16;
    float *values = values_of(m, c, layer, head) + position * 16;
    for (size_t i = 0; i < width; i++) keys[16 * i] = key[i];
    for (size_t i = 0; i < width; i += 16) memcpy(values + i * m->positions, value + i, 16 * sizeof *values);
}

/* Scores of the first `padded` positions, from queries that are rounded to 8 bits. */
static void score8(const smallm_model *m, const cache8 *k, const buffers *b, const float *queries, size_t stride,
                   size_t rows, size_t padded)
{
    size_t width = (size_t)m->head_dim;
    matrix keys = {width, padded, padded / 16, NULL, 1, width, 1, k->keys, k->key_scales, k->key_corrections};
    for (size_t r = 0; r < rows; r++)
        m->kernels->quantise(queries + r * stride, width, 1, width, b->codes + r * width, b->scales + r);
    m->kernels->product8(b->codes, b->scales, width, rows, &keys, b->scores, m->positions);
}

/* The sums of the values, with the weights in b->scores; each weight times the scale of its value is rounded to 8 bits. */
static void mix8(const smallm_model *m, const cache8 *k, const buffers *b, size_t rows, size_t padded)
{
    size_t width = (size_t)m->head_dim, T = m->positions, blocks = padded / VALUE_BLOCK;
    matrix values = {padded, width, width / 16, NULL, blocks, VALUE_BLOCK, T / VALUE_BLOCK, k->values, m->ones,
                     k->value_corrections};
    for (size_t r = 0; r < rows; r++) {
        m->kernels->scale(b->scores + r * T, k->value_scales, padded);
        m->kernels->quantise(b->scores + r * T, padded, blocks, VALUE_BLOCK, b->codes + r * padded, b->scales + r * blocks);
    }
    m->kernels->product8(b->codes, b->scales, padded, rows, &values, b->mixed, width);
}

/* Attention of `rows` queries to the keys of one head. Row r is at `position` + r * step and sees the last `window`
   positions up to its own. y gets rows of head_dim floats. */
static void attend(const smallm_model *m, smallm_context *owner, const buffers *b, size_t layer, size_t head,
                   const float *queries, size_t stride, size_t rows, size_t position, size_t step, float *y,
                   size_t y_stride)
{
    size_t width = (size_t)m->head_dim, T = m->positions, window = m->window > 0 ? (size_t)m->window : T;
    size_t start = position + 1 > window ? position + 1 - window : 0, end = position + (rows - 1) * step + 1;
    size_t unit = m->ones != NULL ? VALUE_BLOCK : 16, from = start / 16 * 16, padded = (end + unit - 1) / unit * unit;
    const float *keys = keys_of(m, owner, layer, head) + from * width, *values = values_of(m, owner, layer, head);
    cache8 k = cache8_of(m, owner, layer, head);
    float sums[MAX_ROWS];
    if (m->ones != NULL) score8(m, &k, b, queries, stride, rows, padded);
    else m->kernels->product(queries, stride, rows, keys, width * 16, width, (padded - from) / 16, b->scores + from, T);
    for (size_t r = 0; r < rows; r++) {
        size_t last = position + r * step + 1, first = last > window ? last - window : 0;
        sums[r] = m->kernels->softmax(b->scores + r * T, from, first, last, padded);
    }
    if (m->ones != NULL) mix8(m, &k, b, rows, padded);
    else
        m->kernels->product(b->scores + from, T, rows, values + from * 16, T * 16, end - from, width / 16, b->mixed, width);
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < width; i++) y[r * y_stride + i] = b->mixed[r * width + i] / sums[r];
}

static void add_rows(float *x, const float *y, size_t count)
{
    for (size_t i = 0; i < count; i++) x[i] += y[i];
}

/* Queries, keys and values of all rows, before their norms and their rotation, into c->packed. */
static void project(const smallm_model *m, smallm_context *c, size_t i, const segment *segments, size_t count,
                    size_t rows)
{
    const layer *l = &m->layers[i];
    size_t stride = m->heads * (size_t)m->head_dim, E = (size_t)m->n_embd;
    if (i == 0 && m->table != NULL) {
        size_t r = 0;
        for (size_t s = 0; s < count; s++)
            for (size_t j = 0; j < segments[s].count; j++, r++)
                memcpy(c->packed + r * stride, m->table + (size_t)segments[s].ids[j] * stride, stride * sizeof(float));
        return;
    }
    for (size_t r = 0; r < rows; r++)
        m->kernels->norm(c->stream + r * E, l->ln_1, c->normed + r * E, E);
    multiply(m, c, &l->qkv, c->normed, E, rows, c->packed, stride);
}

typedef struct {
    smallm_context *context;
    size_t layer;
    const segment *segments;
    size_t count;
} attention_task;

/* The floats of a head, or of its codes, that a thread has room for. */
static size_t head_room(const smallm_model *m)
{
    size_t width = (size_t)m->head_dim;
    return MAX_ROWS * (m->positions > width ? m->positions : width);
}

static buffers buffers_of(const smallm_context *c, size_t part)
{
    size_t room = head_room(c->model);
    buffers b = {c->scores + part * MAX_ROWS * c->model->positions, c->mixed + part * MAX_ROWS * (size_t)c->model->head_dim,
                 c->head_codes + part * room, c->head_scales + part * room / 16};
    return b;
}

/* Computes the attention of a part of the key/value heads of all segments. */
static void attend_part(const void *task, size_t part, size_t parts)
{
    const attention_task *t = task;
    smallm_context *c = t->context;
    const smallm_model *m = c->model;
    size_t width = (size_t)m->head_dim, stride = m->heads * width, heads = (size_t)m->n_kv_head;
    size_t group = (size_t)m->n_head / heads, out = m->layers[t->layer].attention_out.inputs, item = 0, row = 0;
    size_t from = first_item(t->count * heads, part, parts), end = first_item(t->count * heads, part + 1, parts);
    buffers b = buffers_of(c, part);
    for (const segment *g = t->segments; g < t->segments + t->count; row += g++->count)
        for (size_t h = 0; h < heads; h++, item++) {
            float *packed = c->packed + row * stride, *y = c->hidden + row * out;
            if (item < from || item >= end) continue;
            for (size_t j = 0; j < g->count; j++)
                store(m, g->context, &b, t->layer, h, packed + j * stride, g->position + j);
            size_t first = h * group * width;
            if (g->count == 1) /* the queries that share a key/value head are the rows */
                attend(m, g->context, &b, t->layer, h, packed + first, width, group, g->position, 0, y + first, width);
            else
                for (size_t q = first; q < first + group * width; q += width)
                    attend(m, g->context, &b, t->layer, h, packed + q, stride, g->count, g->position, 1, y + q, out);
        }
}

/* Computes the ids of all segments, at most MAX_ROWS, with the buffers of context c. c->logits gets a row of logits for
   each id if `every`, else for the last id of each segment; none if `last` is false. */
static void forward(smallm_context *c, const segment *segments, size_t count, bool every, bool last)
{
    const smallm_model *m = c->model;
    size_t E = (size_t)m->n_embd, I = m->padded_inner, rows = 0;
    c->pool = acquire(m->pool);
    for (size_t s = 0; s < count; s++)
        for (size_t j = 0; j < segments[s].count; j++, rows++)
            memcpy(c->stream + rows * E, m->embedding + (size_t)segments[s].ids[j] * E, E * sizeof(float));
    for (size_t i = 0; i < (size_t)m->n_layer; i++) {
        const layer *l = &m->layers[i];
        project(m, c, i, segments, count, rows);
        attention_task attention = {c, i, segments, count};
        share(c->pool, attend_part, &attention, count * (size_t)m->n_kv_head);
        multiply(m, c, &l->attention_out, c->hidden, l->attention_out.inputs, rows, c->normed, E);
        add_rows(c->stream, c->normed, rows * E);
        for (size_t r = 0; r < rows; r++)
            m->kernels->norm(c->stream + r * E, l->ln_2, c->normed + r * E, E);
        multiply(m, c, &l->gate_up, c->normed, E, rows, c->hidden, 2 * I);
        for (size_t r = 0; r < rows; r++)
            m->kernels->swiglu(c->hidden + 2 * r * I, c->hidden + (2 * r + 1) * I, c->hidden + 2 * r * I, I);
        multiply(m, c, &l->down, c->hidden, 2 * I, rows, c->normed, E);
        add_rows(c->stream, c->normed, rows * E);
    }
    size_t kept = 0, row = 0;
    for (size_t s = 0; s < count; s++)
        for (size_t j = 0; j < segments[s].count; j++, row++)
            if (every || (last && j + 1 == segments[s].count))
                m->kernels->norm(c->stream + row * E, m->ln_f, c->normed + kept++ * E, E);
    if (kept > 0) multiply(m, c, &m->head, c->normed, E, kept, c->logits, m->padded_vocab);
    release(c->pool);
}

/* Moves the part of a full cache that the model's window still covers to the beginning of the cache. The logits that
   follow equal those of an unlimited cache: RoPE attention depends on distances only. */
static void slide(smallm_context *c)
{
    const smallm_model *m = c->model;
    size_t T = (size_t)m->block_size, width = (size_t)m->head_dim, half = width / 2, kept = (size_t)m->window - 1;
    for (size_t part = 0; part < (size_t)m->n_layer * (size_t)m->n_kv_head; part++) {
        float *keys = c->keys + part * m->positions * width, *values = c->values + part * m->positions * width;
        for (size_t i = 0; i < width; i += 16) {
            float *panel = values + i * m->positions;
            memmove(panel, panel + (T - kept) * 16, kept * 16 * sizeof *panel);
        }
        for (size_t to = 0; to < kept; to++) {
            size_t from = to + T - kept;
            float *old = keys + from / 16 * width * 16 + from % 16, *new = keys + to / 16 * width * 16 + to % 16;
            for (size_t i = 0; i < half; i++) {
                float low = old[16 * i], high = old[16 * (half + i)];
                float low_cos = low * m->rotation[i], high_sin = high * m->rotation[half + i];
                float high_cos = high * m->rotation[i], low_sin = low * m->rotation[half + i];
                new[16 * i] = low_cos + high_sin;
                new[16 * (half + i)] = high_cos - low_sin;
            }
        }
    }
    c->state.cached = kept;
}

/* Decides which ids the next pass computes; they may be begun already. */
static void plan_pass(smallm_context *c)
{
    sequence_state *d = &c->state;
    size_t T = (size_t)c->model->block_size;
    if (d->cached < d->wanted) return; /* a pass that was cancelled */
    if (d->cached == T && d->options.overflow == SMALLM_SLIDE) slide(c);
    if (d->cached > 0 && d->cached < T) {
        d->wanted = d->cached + 1;
        return;
    }
    /* The cache is empty: read the seed. Or it is full: read the ids that `overflow` keeps. */
    size_t window = d->cached == 0 || d->options.overflow == SMALLM_CROP ? T : T / 2 > 1 ? T / 2 : 1;
    d->cached = 0;
    d->wanted = window < d->known ? window : d->known;
}

/* Computes all wanted ids but the last m->rows; SMALLM_CANCELLED if that is asked for. */
static smallm_status prefill(smallm_context *c)
{
    sequence_state *d = &c->state;
    size_t rows = c->model->rows;
    while (d->wanted - d->cached > rows) {
        if (c->cancelled) return fail(c->error, SMALLM_CANCELLED, "generation was cancelled; call again to continue");
        segment s = {c, c->history + (d->known - (d->wanted - d->cached)), rows, d->cached};
        forward(c, &s, 1, false, false);
        d->cached += rows;
    }
    return SMALLM_OK;
}

/* -- the sampler: SAMPLING.md -- */

static uint32_t mix(uint32_t x)
{
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

static uint32_t rng_key(uint32_t seed, uint32_t stream) { return mix(mix(seed) + stream); }

/* Draw i = 1, 2, ... of a key; its upper 24 bits are u. */
static uint32_t draw(uint32_t key, uint32_t i) { return mix(key + i * 0x9E3779B9u); }

static double u_of(uint32_t key, uint32_t i) { return (double)(draw(key, i) >> 8) / 16777216.0; }

/* Writes the logits into c->processed, with the repetition penalty on the given ids. */
static void apply_repetition_penalty(smallm_context *c, const float *logits, const int32_t *ids, size_t count, double penalty)
{
    float p = (float)penalty;
    memcpy(c->processed, logits, (size_t)c->model->vocab_size * sizeof *logits);
    for (size_t i = 0; i < count && p != 1.0f; i++) {
        float x = logits[ids[i]];
        c->processed[ids[i]] = x > 0 ? x / p : x * p;
    }
}

/* A number that decreases with the logit; equal logits, and 0 and -0, have equal numbers. */
static uint32_t descending(float logit)
{
    uint32_t bits;
    logit += 0.0f; /* -0 + 0 = 0 */
    memcpy(&bits, &logit, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

/* Sort keys of the ids: by descending logit, of equal logits by ascending id. */
static void make_keys(smallm_context *c)
{
    for (size_t id = 0; id < (size_t)c->model->vocab_size; id++)
        c->sort_keys[id] = (uint64_t)descending(c->processed[id]) << 32 | id;
}

/* The key with a rank, from 0, byte by byte from the highest; takes the same time for all logits. */
static uint64_t key_at(const smallm_context *c, size_t rank)
{
    size_t V = (size_t)c->model->vocab_size, id = 0;
    uint64_t found = 0;
    for (int shift = 56; shift >= 32; shift -= 8) {
        size_t counts[256] = {0};
        uint64_t byte = 0;
        for (size_t i = 0; i < V; i++) {
            uint64_t rest = (c->sort_keys[i] ^ found) >> shift;
            if (rest < 256) counts[rest]++;
        }
        for (; counts[byte] <= rank; byte++) rank -= counts[byte];
        found |= byte << shift;
    }
    while (c->sort_keys[id] >> 32 != found >> 32 || rank-- > 0) id++;
    return c->sort_keys[id];
}

/* Sorts the keys up to `last` into c->order by a radix sort. Returns their number. */
static size_t rank(smallm_context *c, uint64_t last)
{
    size_t count = 0;
    for (size_t i = 0; i < (size_t)c->model->vocab_size; i++)
        if (c->sort_keys[i] <= last) c->order[count++] = c->sort_keys[i];
    for (int shift = 32; shift < 64; shift += 8) { /* the sort is stable, so equal logits stay in the order of the ids */
        size_t starts[257] = {0};
        for (size_t i = 0; i < count; i++) starts[(c->order[i] >> shift & 0xFF) + 1]++;
        for (int i = 0; i < 256; i++) starts[i + 1] += starts[i];
        for (size_t i = 0; i < count; i++) c->spare[starts[c->order[i] >> shift & 0xFF]++] = c->order[i];
        uint64_t *sorted = c->spare;
        c->spare = c->order, c->order = sorted;
    }
    return count;
}

static double weight(double logit, double largest, double temperature)
{
    return exponential((logit - largest) / (temperature > MIN_TEMPERATURE ? temperature : MIN_TEMPERATURE));
}

/* top-p: the last key of the shortest ranking prefix that has top_p of the weight of the keys up to `last`. */
static uint64_t last_of_share(smallm_context *c, uint64_t last, double largest, const smallm_options *options)
{
    size_t count = rank(c, last), taken = 0;
    double total = 0, sum = 0;
    for (size_t i = 0; i < count; i++) {
        c->weights[i] = weight(c->processed[c->order[i] & 0xFFFFFFFFu], largest, options->temperature);
        total += c->weights[i];
    }
    for (double share = options->top_p * total; (sum += c->weights[taken]) < share && taken + 1 < count;) taken++;
    return c->order[taken];
}

/* The id that u in [0, 1) selects from c->processed; -1 if the logits are not finite. */
static int32_t sample(smallm_context *c, double u, const smallm_options *options)
{
    size_t likeliest = 0, V = (size_t)c->model->vocab_size, taken = 0;
    for (size_t i = 0; i < V; i++) {
        if (isnan(c->processed[i])) return -1;
        if (c->processed[i] > c->processed[likeliest]) likeliest = i;
    }
    double largest = c->processed[likeliest], sum = 0;
    if (!isfinite(largest)) return -1;
    if (options->temperature == 0) return (int32_t)likeliest;
    uint64_t last = UINT64_MAX; /* the last key that is kept */
    make_keys(c);
    if (options->top_k > 0 && (uint64_t)options->top_k < V) last = key_at(c, (size_t)options->top_k - 1);
    if (options->top_p < 1) last = last_of_share(c, last, largest, options);
    for (size_t i = 0; i < V; i++) {
        double one = c->sort_keys[i] <= last ? weight(c->processed[i], largest, options->temperature) : 0;
        c->weights[i] = sum += one >= options->min_p ? one : 0;
    }
    for (double share = u * sum; c->weights[taken] <= share;) taken++; /* u < 1, so the loop ends */
    return (int32_t)taken;
}

/* -- allowed characters -- */

static bool has(const uint64_t *characters, uint32_t code) { return (characters[code / 64] >> code % 64 & 1) != 0; }

static bool has_any(const uint64_t *characters, uint32_t from, uint32_t to)
{
    if (to > CODE_POINTS) to = CODE_POINTS;
    for (uint32_t code = from; code < to;) {
        if (has(characters, code)) return true;
        code += code % 64 == 0 && characters[code / 64] == 0 ? 64 : 1;
    }
    return false;
}

/* The leading bits of a code point that the first bytes of its UTF-8 sequence hold. */
static uint32_t bits_of(const uint8_t *bytes, int length)
{
    uint32_t bits = sequence_length(*bytes) == 1 ? *bytes : *bytes & (0x7Fu >> sequence_length(*bytes));
    for (int i = 1; i < length; i++) bits = bits << 6 | (bytes[i] & 0x3Fu);
    return bits;
}

static void set_characters(uint64_t *characters, span text, bool value)
{
    for (int length; (length = character_length(text)) > 0; text.at += length) {
        uint32_t code = bits_of(text.at, length);
        uint64_t bit = (uint64_t)1 << code % 64;
        characters[code / 64] = value ? characters[code / 64] | bit : characters[code / 64] & ~bit;
    }
}

/* Whether an incomplete character can still become an allowed one. */
static bool can_be_completed(const uint64_t *characters, const pending *unfinished)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000}; /* lowest code point with this number of bytes */
    if (unfinished->length == 0) return true;
    int length = sequence_length(unfinished->bytes[0]);
    uint32_t ends = 1u << 6 * (length - unfinished->length);
    uint32_t from = bits_of(unfinished->bytes, unfinished->length) * ends;
    return has_any(characters, from > least[length] ? from : least[length], from + ends);
}

static span bytes_of(const smallm_model *model, int32_t id, uint8_t *byte)
{
    *byte = (uint8_t)id;
    return id < 256 ? span_of(byte, 1) : span_of(model->tokens[id - 256].bytes, model->tokens[id - 256].length);
}

/* Whether an id may follow the bytes of an incomplete character. */
static bool is_allowed(const smallm_model *model, const uint64_t *characters, pending unfinished, int32_t id)
{
    char text[MAX_PUSHED];
    uint8_t byte;
    size_t bytes = 0;
    for (span s = bytes_of(model, id, &byte); s.at < s.end; s.at++)
        bytes += push_byte(&unfinished, *s.at, text + bytes);
    span completed = span_of(text, bytes);
    for (int length; (length = character_length(completed)) > 0; completed.at += length)
        if (!has(characters, bits_of(completed.at, length))) return false;
    return can_be_completed(characters, &unfinished);
}

static void find_allowed(const smallm_model *model, sequence_state *d)
{
    for (int32_t id = 0; id < model->vocab_size; id++)
        d->allowed[id] = is_allowed(model, d->characters, d->decoder, id);
    d->allowed_after = d->decoder;
}

/* Sets ids that are not allowed to minus infinity in c->processed, or to NaN if their logit is infinite. */
static void apply_allowed(smallm_context *c, const float *logits)
{
    const smallm_model *model = c->model;
    sequence_state *d = &c->state;
    if (d->characters == NULL) return;
    if (d->decoder.length != d->allowed_after.length ||
        memcmp(d->decoder.bytes, d->allowed_after.bytes, (size_t)d->decoder.length) != 0)
        find_allowed(model, d);
    for (size_t i = 0; i < (size_t)c->model->vocab_size; i++)
        if (!d->allowed[i]) c->processed[i] = logits[i] - INFINITY;
}

/* -- the state of a text -- */

/* Adds an id to the history, of which at least the last block_size ids are kept. */
static void remember(smallm_context *c, int32_t id)
{
    size_t T = (size_t)c->model->block_size;
    if (c->state.known == 2 * T) {
        memmove(c->history, c->history + T, T * sizeof *c->history);
        c->state.known = T;
    }
    c->history[c->state.known++] = id;
}

/* The last T characters of a text, which have at least T ids. */
static span last_characters(span text, size_t T)
{
    const uint8_t *at = text.end;
    for (size_t characters = 0; at > text.at && characters < T;) characters += !continues(*--at);
    text.at = at;
    return text;
}

static void remember_seed(smallm_context *c, span seed)
{
    size_t T = (size_t)c->model->block_size;
    int32_t ids[4];
    c->state.known = 0;
    for (seed = last_characters(seed, T); seed.at < seed.end;) {
        int length = character_length(seed), count = spell(c->model, seed.at, length, ids);
        for (int i = 0; i < count; i++) remember(c, ids[i]);
        seed.at += length;
    }
    size_t surplus = c->state.known > T ? c->state.known - T : 0;
    memmove(c->history, c->history + surplus, (c->state.known - surplus) * sizeof *c->history);
    c->state.known -= surplus;
}

/* The length of the longest prefix of the word that the text ends with; `matched` is the length before this byte. */
static size_t longer(const stop *s, size_t matched, uint8_t byte)
{
    while (matched > 0 && s->word[matched] != byte) matched = s->borders[matched - 1];
    return matched + (s->word[matched] == byte);
}

static void prepare_stop(stop *s)
{
    s->matched = 0;
    s->borders[0] = 0;
    for (size_t i = 1; i < s->length; i++) s->borders[i] = longer(s, s->borders[i - 1], s->word[i]);
}

/* Adds a character; releases what cannot be part of a stop string, and ends the text at a stop string. */
static void add_character(sequence_state *d, const char *character, size_t bytes, double logprob)
{
    size_t met = 0, begun = 0;
    d->logprobs[d->ready + d->held] = logprob;
    memcpy(d->text + d->ready + d->held, character, bytes);
    d->held += bytes;
    for (size_t i = 0; i < d->stop_count && d->length >= d->options.min_length; i++) {
        stop *s = &d->stops[i];
        for (size_t b = 0; b < bytes; b++) s->matched = longer(s, s->matched, (uint8_t)character[b]);
        if (s->matched > begun) begun = s->matched;
        if (s->matched == s->length && s->matched > met) met = s->matched;
    }
    size_t free = d->held - (met > 0 ? met : begun);
    d->ready += free;
    d->held -= free;
    d->length++;
    if (met > 0) d->held = 0;
    d->done = met > 0 || d->length == d->options.max_length;
    if (d->done) d->ready += d->held, d->held = 0;
}

/* Adds an id to the text. If it completes several characters, its probability counts for the last one that max_length
   admits. */
static void push(smallm_context *c, int32_t id)
{
    sequence_state *d = &c->state;
    char text[MAX_PUSHED];
    size_t bytes = 0;
    uint8_t byte;
    remember(c, id);
    for (span s = bytes_of(c->model, id, &byte); s.at < s.end; s.at++)
        bytes += push_byte(&d->decoder, *s.at, text + bytes);
    for (size_t at = 0; at < bytes && !d->done;) {
        size_t length = (size_t)sequence_length((uint8_t)text[at]);
        bool last = at + length == bytes || d->length + 1 == d->options.max_length;
        add_character(d, text + at, length, last ? d->logprob : 0);
        if (last) d->logprob = 0;
        at += length;
    }
}

/* Writes e^(logit - largest) into c->weights; the largest logit and the sum. False if the logits are not finite. */
static bool softmax_sum(smallm_context *c, const float *logits, double *largest, double *total)
{
    size_t V = (size_t)c->model->vocab_size;
    float most = logits[0];
    for (size_t i = 0; i < V; i++) {
        if (isnan(logits[i])) return false;
        if (logits[i] > most) most = logits[i];
    }
    if (!isfinite(most)) return false;
    *largest = most, *total = 0;
    for (size_t i = 0; i < V; i++) c->weights[i] = (double)logits[i] - *largest;
    c->model->kernels->exponentials(c->weights, c->model->padded_vocab);
    for (size_t i = 0; i < V; i++) *total += c->weights[i];
    return true;
}

/* Surprisal of a target in nats, from the logits; NaN if the logits are not finite. */
static double nats_of(smallm_context *c, const float *logits, int32_t target)
{
    double largest, total;
    if (!softmax_sum(c, logits, &largest, &total)) return NAN;
    return logarithm(total) - ((double)logits[target] - largest);
}

/* Chooses the next id from its logits. */
static smallm_status choose(smallm_context *c, const float *logits)
{
    sequence_state *d = &c->state;
    const smallm_options *o = &d->options;
    size_t seen = o->repetition_window > 0 ? (size_t)o->repetition_window : (size_t)c->model->block_size;
    if (seen > d->known) seen = d->known;
    apply_repetition_penalty(c, logits, c->history + (d->known - seen), seen, o->repetition_penalty);
    apply_allowed(c, logits);
    int32_t id = sample(c, u_of(d->key, ++d->draws), o);
    if (id < 0) return not_finite(c->error);
    if (o->logprobs != 0) d->logprob -= nats_of(c, logits, id);
    push(c, id);
    return SMALLM_OK;
}

/* The last ids of the pass that is planned, at most m->rows. */
static segment last_segment(smallm_context *c)
{
    sequence_state *d = &c->state;
    segment s = {c, c->history + (d->known - (d->wanted - d->cached)), d->wanted - d->cached, d->cached};
    return s;
}

/* Computes and chooses the next id of each context, in one pass with the buffers of the first. */
static smallm_status advance(smallm_context *const *contexts, size_t count)
{
    segment segments[MAX_ROWS] = {{NULL, NULL, 0, 0}};
    for (size_t i = 0; i < count; i++) segments[i] = last_segment(contexts[i]);
    forward(contexts[0], segments, count, false, true);
    smallm_status first = SMALLM_OK;
    for (size_t i = 0; i < count; i++) {
        smallm_context *c = contexts[i];
        c->state.cached = c->state.wanted;
        smallm_status status = choose(c, contexts[0]->logits + i * c->model->padded_vocab);
        if (first == SMALLM_OK) first = status;
    }
    return first;
}

/* -- drafts: speculative decoding (Leviathan et al. 2023). A pass computes the last id together with drafts of the next ids.
      The draft table and the logits choose with the same u, so they often agree. A wrong draft costs time only. -- */

/* The row for the longest suffix of a context that is in the table; NULL if no suffix is. */
static const draft_row *find_row(const smallm_model *m, uint64_t context)
{
    for (int left = DRAFT_CONTEXT; left >= 0; left--) {
        uint64_t key = left > 0 ? context << 16 * (DRAFT_CONTEXT - left) >> 16 * (DRAFT_CONTEXT - left) : 0;
        size_t from = 0, to = m->draft_rows;
        while (from < to) {
            size_t middle = (from + to) / 2;
            if (m->draft_table[middle].context < key) from = middle + 1;
            else to = middle;
        }
        if (from < m->draft_rows && m->draft_table[from].context == key) return &m->draft_table[from];
    }
    return NULL;
}

/* The id that u selects after a context, and the chance that the logits select the same; -1 without a row. */
static int32_t propose(const smallm_context *c, uint64_t context, double u, double *chance)
{
    const draft_row *row = find_row(c->model, context);
    const double *weights = c->state.draft_weights;
    double sum = 0, total = 0;
    size_t i = 0;
    if (row == NULL) return -1;
    for (size_t j = 0; j < ALTERNATIVES; j++) total += weights[row->nats[j]];
    while ((sum += weights[row->nats[i]]) <= u * total && i + 1 < ALTERNATIVES) i++;
    double p = weights[row->nats[i]] / total;
    *chance = (p + 0.05) / (p + 0.15); /* as measured: 0.4 for unlikely ids, 0.9 for likely ones */
    return row->ids[i];
}

/* Writes drafts behind the history, as long as all of them are likely to be right, and returns their number. *first = the
   chance of the first proposal, which is written even if it is too unlikely to be a draft; unchanged without a proposal. */
static size_t write_drafts(smallm_context *c, double *first)
{
    sequence_state *d = &c->state;
    size_t T = (size_t)c->model->block_size, room = (size_t)d->options.max_drafts, count = 0;
    static const double MIN_CHANCES[MAX_DRAFTS] = {MIN_CHANCE, 0.7, 0.3, 0.3}; /* 4 ids take hardly longer than 3 */
    uint64_t context = 0;
    double all = d->acceptance, chance = 0;
    if (room > T - d->wanted) room = T - d->wanted;
    if (room > 2 * T - d->known) room = 2 * T - d->known; /* `remember` would move the drafts */
    for (size_t i = d->known < DRAFT_CONTEXT ? 0 : d->known - DRAFT_CONTEXT; i < d->known; i++)
        context = context << 16 | (uint64_t)(c->history[i] + 1);
    for (; count < room; count++) {
        int32_t id = propose(c, context, u_of(d->key, d->draws + 1 + (uint32_t)count), &chance);
        if (id < 0) break;
        c->history[d->known + count] = id;
        if (count == 0) *first = chance;
        if ((all *= chance) < MIN_CHANCES[count]) break;
        context = context << 16 | (uint64_t)(id + 1);
    }
    return count;
}

/* Chooses the next id of a context: after a right draft from the logits of the last pass, else from those of a new one. */
static smallm_status advance_with_drafts(smallm_context *c)
{
    sequence_state *d = &c->state;
    double first = 0;
    if (d->drafts > 0) {
        d->drafts--, d->row++;
    } else {
        segment s = last_segment(c);
        /* If acceptance is too low for any draft, the table is only used for one id in eight, to measure it again. */
        if (s.count == 1 && c->model->draft_table != NULL && (d->acceptance >= MIN_CHANCE || d->draws % 8 == 0))
            d->drafts = write_drafts(c, &first);
        s.count += d->drafts, d->row = 0;
        forward(c, &s, 1, d->drafts > 0, true);
    }
    d->cached = d->wanted;
    int32_t draft = c->history[d->known]; /* of the id that is chosen now, if there is one */
    TRY(choose(c, c->logits + d->row * c->model->padded_vocab));
    bool right = c->history[d->known - 1] == draft;
    if (!right) d->drafts = 0;
    if (first > 0) d->acceptance += (right - d->acceptance * first) / 32;
    return SMALLM_OK;
}

/* -- the start of a text -- */

static void end_sequence(sequence_state *d)
{
    free(d->stops);
    free(d->words);
    free(d->borders);
    free(d->characters);
    free(d->allowed);
    free(d->text);
    free(d->logprobs);
    free(d->chunk_logprobs);
    free(d->chunk);
    memset(d, 0, sizeof *d);
}

/* Copies options over their defaults. Options of an older program are shorter; those of a newer program are longer, and
   the fields that this library does not know must be 0. Both kinds of options begin with their size. */
static smallm_status read_options(char *error, const void *given, void *options, size_t known)
{
    size_t size;
    memcpy(&size, given, sizeof size);
    if (size < sizeof size) return fail(error, SMALLM_MISTAKE, "options.size is not set; set it to sizeof options");
    for (size_t i = known; i < size; i++)
        if (((const uint8_t *)given)[i] != 0)
            return fail(error, SMALLM_MISTAKE, "options has a field that this smallm.c does not know; use a newer one");
    memcpy(options, given, size < known ? size : known);
    memcpy(options, &known, sizeof known);
    return SMALLM_OK;
}

static smallm_status out_of_range(char *error, const char *name, double value, const char *rule)
{
    return fail(error, SMALLM_MISTAKE, "%s = %.17g is out of range; it must be %s", name, value, rule);
}

static smallm_status check_options(const smallm_model *model, char *error, const smallm_options *o)
{
    if (!(o->temperature >= 0 && isfinite(o->temperature)))
        return out_of_range(error, "temperature", o->temperature, "0 or more (0 = the likeliest character)");
    if (o->top_k < 0) return out_of_range(error, "top_k", (double)o->top_k, "0 or more (0 = all ids)");
    if (!(o->top_p > 0 && o->top_p <= 1))
        return out_of_range(error, "top_p", o->top_p, "above 0 and at most 1 (1 = all ids)");
    if (!(o->min_p >= 0 && o->min_p <= 1)) return out_of_range(error, "min_p", o->min_p, "from 0 to 1 (0 = all ids)");
    if (!(o->repetition_penalty >= 0.01 && o->repetition_penalty <= 100))
        return out_of_range(error, "repetition_penalty", o->repetition_penalty, "from 0.01 to 100 (1 = off)");
    if (o->repetition_window < 0 || o->repetition_window > model->block_size)
        return out_of_range(error, "repetition_window", (double)o->repetition_window,
                            "from 0 to block_size (0 = block_size)");
    if (o->max_length < 0) return out_of_range(error, "max_length", (double)o->max_length, "0 or more");
    if (o->min_length < 0) return out_of_range(error, "min_length", (double)o->min_length, "0 or more");
    if (o->min_length > o->max_length)
        return fail(error, SMALLM_MISTAKE, "min_length = %lld is more than max_length = %lld; lower min_length",
                    (long long)o->min_length, (long long)o->max_length);
    if (o->overflow != SMALLM_CROP && o->overflow != SMALLM_SHIFT && o->overflow != SMALLM_SLIDE)
        return out_of_range(error, "overflow", o->overflow, "SMALLM_CROP, SMALLM_SHIFT or SMALLM_SLIDE");
    if (o->max_drafts < 0 || o->max_drafts > MAX_DRAFTS)
        return out_of_range(error, "max_drafts", o->max_drafts, "from 0 to 4 (0 = no drafts)");
    if (o->overflow == SMALLM_SLIDE && model->window == 0)
        return fail(error, SMALLM_MISTAKE, "overflow = SMALLM_SLIDE needs a model that was trained with model.window; "
                    "use SMALLM_CROP or SMALLM_SHIFT");
    return SMALLM_OK;
}

static smallm_status check_text(char *error, const char *what, const char *text, size_t bytes)
{
    if (text == NULL && bytes > 0) return fail(error, SMALLM_MISTAKE, "the %s is NULL; pass its text", what);
    if (bytes == 0) return SMALLM_OK;
    size_t valid = (size_t)(valid_until(span_of(text, bytes)) - (const uint8_t *)text);
    if (valid == bytes) return SMALLM_OK;
    return fail(error, SMALLM_MISTAKE, "the %s is not UTF-8 from byte %zu on; convert it", what, valid);
}

/* Copies the stop strings except empty ones, and allocates room for the text that they may hold back. */
static smallm_status prepare_stops(smallm_context *c, sequence_state *d)
{
    size_t total = 0, longest = 0, count = 0;
    const char *const *given = d->options.stops;
    if (d->options.stop_count > 0 && given == NULL)
        return fail(c->error, SMALLM_MISTAKE, "stops is NULL; pass the stop strings, or stop_count = 0");
    for (size_t i = 0; i < d->options.stop_count; i++) {
        size_t length = given[i] == NULL ? 0 : strlen(given[i]);
        TRY(check_text(c->error, "stop", given[i], given[i] == NULL ? 1 : length));
        total += length;
        longest = length > longest ? length : longest;
        count += length > 0;
    }
    d->room = longest + 2 * MAX_PUSHED;
    d->text = calloc(d->room + 1, 1);
    d->logprobs = calloc(d->room + 1, sizeof *d->logprobs);
    d->chunk_logprobs = calloc(d->room + 1, sizeof *d->chunk_logprobs);
    d->chunk = calloc(d->room + 1, 1);
    d->stops = calloc(count + 1, sizeof *d->stops);
    d->words = calloc(total + 1, 1);
    d->borders = calloc(total + 1, sizeof *d->borders);
    if (!(d->text && d->logprobs && d->chunk_logprobs && d->chunk && d->stops && d->words && d->borders))
        return no_memory(c->error);
    size_t at = 0;
    for (size_t i = 0; i < d->options.stop_count; i++) {
        stop *s = &d->stops[d->stop_count];
        if ((s->length = strlen(given[i])) == 0) continue;
        s->word = memcpy(d->words + at, given[i], s->length);
        s->borders = d->borders + at;
        prepare_stop(s);
        at += s->length;
        d->stop_count++;
    }
    return SMALLM_OK;
}

/* Builds the set of allowed characters unless all are allowed, and finds the ids that may come first. */
static smallm_status prepare_allowed(smallm_context *c, sequence_state *d)
{
    const char *allowed = d->options.allowed, *banned = d->options.banned == NULL ? "" : d->options.banned;
    if (allowed == NULL && *banned == '\0') return SMALLM_OK;
    if (allowed != NULL) TRY(check_text(c->error, "option allowed", allowed, strlen(allowed)));
    TRY(check_text(c->error, "option banned", banned, strlen(banned)));
    d->characters = calloc(CODE_POINTS / 64, sizeof *d->characters);
    d->allowed = calloc((size_t)c->model->vocab_size, sizeof *d->allowed);
    if (d->characters == NULL || d->allowed == NULL) return no_memory(c->error);
    if (allowed == NULL) memset(d->characters, 0xFF, CODE_POINTS / 8);
    else set_characters(d->characters, span_of(allowed, strlen(allowed)), true);
    set_characters(d->characters, span_of(banned, strlen(banned)), false);
    memset(d->characters + 0xD800 / 64, 0, 0x800 / 8); /* surrogates are not characters */
    if (!has_any(d->characters, 0, CODE_POINTS))
        return fail(c->error, SMALLM_MISTAKE, "allowed and banned leave no character; allow one that is not banned");
    find_allowed(c->model, d);
    return SMALLM_OK;
}

static smallm_status start(smallm_context *c, const char *seed, size_t bytes, const smallm_options *options)
{
    const smallm_model *model = c->model;
    sequence_state *d = &c->state;
    smallm_default_options(model, &d->options, sizeof d->options);
    if (options != NULL) TRY(read_options(c->error, options, &d->options, sizeof d->options));
    TRY(check_options(model, c->error, &d->options));
    TRY(check_text(c->error, "seed text", seed, bytes));
    TRY(prepare_stops(c, d));
    TRY(prepare_allowed(c, d));
    d->options.stops = NULL, d->options.allowed = d->options.banned = NULL;
    remember_seed(c, bytes > 0 ? span_of(seed, bytes) : span_of(model->start_text, model->start_bytes));
    d->key = rng_key(d->options.rng_seed, d->options.stream_number);
    d->done = d->options.max_length == 0;
    d->begun = true;
    d->acceptance = 1;
    for (int i = 0; i < NO_ID; i++) d->draft_weights[i] = weight(-i / 32.0, 0, d->options.temperature);
    return SMALLM_OK;
}

/* A copy of `bytes` bytes; NULL for NULL, and if there is not enough memory, which clears *enough. */
static void *copy_of(const void *memory, size_t bytes, bool *enough)
{
    if (memory == NULL) return NULL;
    void *copy = malloc(bytes);
    if (copy != NULL) memcpy(copy, memory, bytes);
    else *enough = false;
    return copy;
}

/* Copies a state into another context of the same model, whose state is empty. */
static bool copy_sequence(const smallm_model *model, const sequence_state *from, sequence_state *to)
{
    bool enough = true;
    size_t words = 0;
    for (size_t i = 0; i < from->stop_count; i++) words += from->stops[i].length;
    *to = *from;
    to->drafts = 0; /* their logits are not copied */
    to->stops = copy_of(from->stops, (from->stop_count + 1) * sizeof *to->stops, &enough);
    to->words = copy_of(from->words, words + 1, &enough);
    to->borders = copy_of(from->borders, (words + 1) * sizeof *to->borders, &enough);
    to->characters = copy_of(from->characters, CODE_POINTS / 8, &enough);
    to->allowed = copy_of(from->allowed, (size_t)model->vocab_size * sizeof *to->allowed, &enough);
    to->text = copy_of(from->text, from->room + 1, &enough);
    to->logprobs = copy_of(from->logprobs, (from->room + 1) * sizeof *to->logprobs, &enough);
    to->chunk_logprobs = copy_of(from->chunk_logprobs, (from->room + 1) * sizeof *to->logprobs, &enough);
    to->chunk = copy_of(from->chunk, from->room + 1, &enough);
    for (size_t i = 0, at = 0; enough && i < to->stop_count; at += to->stops[i++].length) {
        to->stops[i].word = (const uint8_t *)to->words + at;
        to->stops[i].borders = to->borders + at;
    }
    return enough;
}

/* -- measuring -- */

/* The state of scoring a text: one window of its ids. */
typedef struct {
    smallm_context *context; /* with a cache of its own */
    int32_t *ids;  /* (T + 1) */
    size_t held;
    double *nats; /* of each character */
    size_t character; /* index of the last scored character */
} scorer;

/* Scores the targets of a window, and begins the next window with the last of them. */
static smallm_status measure(scorer *r)
{
    const smallm_model *m = r->context->model;
    if (r->held < 2) return SMALLM_OK;
    for (size_t at = 0; at < r->held - 1;) {
        size_t count = r->held - 1 - at < m->rows ? r->held - 1 - at : m->rows;
        segment s = {r->context, r->ids + at, count, at};
        forward(r->context, &s, 1, true, true);
        for (size_t i = 0; i < count; i++, at++) {
            int32_t target = r->ids[at + 1];
            if (begins_character(target)) r->nats[++r->character] = 0;
            double found = nats_of(r->context, r->context->logits + i * m->padded_vocab, target);
            if (!isfinite(found)) return not_finite(r->context->error);
            r->nats[r->character] += found; /* the first character stays NaN */
        }
    }
    r->ids[0] = r->ids[r->held - 1];
    r->held = 1;
    return SMALLM_OK;
}

static smallm_status score(span text, scorer *r)
{
    size_t T = (size_t)r->context->model->block_size;
    int32_t ids[4];
    while (text.at < text.end) {
        int length = character_length(text), count = spell(r->context->model, text.at, length, ids);
        for (int i = 0; i < count; i++) {
            r->ids[r->held++] = ids[i];
            if (r->held == T + 1) TRY(measure(r));
        }
        text.at += length;
    }
    return measure(r);
}

/* The first ids of a character, and their probability. */
typedef struct {
    double probability;
    size_t number; /* of the paths that were added before it */
    int32_t ids[4];
    int count;
} path;

/* A binary heap: each path precedes those at twice its index + 1 and + 2. */
typedef struct {
    path *items;
    size_t count, room, added;
} paths;

/* Whether a path is taken before another: it is more likely, or as likely and was added before. */
static bool precedes(const path *a, const path *b)
{
    return a->probability > b->probability || (a->probability == b->probability && a->number < b->number);
}

static bool add_path(paths *list, const path *p)
{
    if (list->count == list->room) {
        path *more = realloc(list->items, (list->room = 2 * list->room + 64) * sizeof *more);
        if (more == NULL) return false;
        list->items = more;
    }
    path added = *p;
    added.number = list->added++;
    size_t at = list->count++;
    for (; at > 0 && precedes(&added, &list->items[(at - 1) / 2]); at = (at - 1) / 2)
        list->items[at] = list->items[(at - 1) / 2];
    list->items[at] = added;
    return true;
}

/* Takes the most likely path; of equal ones the one that was added first. */
static path take_path(paths *list)
{
    path taken = list->items[0], last = list->items[--list->count];
    size_t at = 0;
    for (size_t child; (child = 2 * at + 1) < list->count; at = child) {
        if (child + 1 < list->count && precedes(&list->items[child + 1], &list->items[child])) child++;
        if (!precedes(&list->items[child], &last)) break;
        list->items[at] = list->items[child];
    }
    list->items[at] = last;
    return taken;
}

/* The logits after the text of a context and the ids of a path, which the cache does not keep. */
static const float *logits_after(smallm_context *c, const path *p)
{
    sequence_state *d = &c->state;
    size_t T = (size_t)c->model->block_size, known = d->known, n = (size_t)p->count;
    if (n == 0 || known + n > T) { /* the last T ids of both, from the beginning */
        for (size_t i = 0; i < n; i++) c->history[known + i] = p->ids[i];
        size_t all = known + n, kept = all < T ? all : T;
        for (size_t at = 0; at < kept;) {
            size_t count = kept - at < c->model->rows ? kept - at : c->model->rows;
            segment s = {c, c->history + (all - kept + at), count, at};
            forward(c, &s, 1, false, at + count == kept);
            at += count;
        }
    } else {
        segment s = {c, p->ids, n, known};
        forward(c, &s, 1, false, true);
    }
    return c->logits;
}

/* Adds a path for each id that may follow. */
static smallm_status extend(smallm_context *c, const path *p, paths *list)
{
    size_t V = (size_t)c->model->vocab_size;
    const float *logits = logits_after(c, p);
    double largest, total;
    if (!softmax_sum(c, logits, &largest, &total)) return not_finite(c->error);
    for (size_t i = 0; i < V; i++) {
        path longer_path = *p;
        if (begins_character((int32_t)i) != (p->count == 0)) continue; /* it could not become a character */
        longer_path.ids[longer_path.count++] = (int32_t)i;
        longer_path.probability *= c->weights[i] / total;
        if (!add_path(list, &longer_path)) return no_memory(c->error);
    }
    return SMALLM_OK;
}

/* Writes the bytes of a path; returns their number, at most 4 for each of at most 4 ids. */
static size_t path_bytes(const smallm_model *m, const path *p, uint8_t bytes[16])
{
    uint8_t byte;
    size_t length = 0;
    for (int i = 0; i < p->count; i++)
        for (span s = bytes_of(m, p->ids[i], &byte); s.at < s.end; s.at++) bytes[length++] = *s.at;
    return length;
}

/* Whether these bytes are one character, and the path is how `spell` writes it. */
static bool is_spelling(const smallm_model *m, const path *p, const uint8_t *bytes, size_t length)
{
    int32_t ids[4];
    if ((size_t)character_length(span_of(bytes, length)) != length) return false;
    return spell(m, bytes, (int)length, ids) == p->count &&
           memcmp(ids, p->ids, (size_t)p->count * sizeof *ids) == 0;
}

static smallm_status find_characters(smallm_context *c, paths *list, smallm_character *found, size_t capacity,
                                     size_t *count)
{
    path none = {1, 0, {0, 0, 0, 0}, 0};
    if (!add_path(list, &none)) return no_memory(c->error);
    while (list->count > 0 && *count < capacity) {
        path p = take_path(list);
        uint8_t bytes[16];
        size_t length = path_bytes(c->model, &p, bytes);
        if (length > 0 && (size_t)sequence_length(bytes[0]) <= length) {
            if (!is_spelling(c->model, &p, bytes, length)) continue;
            smallm_character *one = &found[(*count)++];
            memset(one->text, 0, sizeof one->text);
            memcpy(one->text, bytes, length);
            one->probability = p.probability;
        } else if (p.count < 4 && p.probability > MIN_PROBABILITY) {
            TRY(extend(c, &p, list));
        }
    }
    return SMALLM_OK;
}

/* -- the public functions -- */

static smallm_status open_checked(smallm_model *model, span file, const smallm_open_options *options)
{
    smallm_open_options known = {sizeof known, NULL, 1};
    if (options != NULL) TRY(read_options(model->error, options, &known, sizeof known));
    if (!choose_kernels(model, known.kernels))
        return fail(model->error, SMALLM_MISTAKE, "kernels = %.20s is not an instruction set of this processor; pass NULL",
                    known.kernels);
    model->threads = known.threads > 0 ? known.threads : 1;
    if (model->threads > MAX_THREADS)
        return fail(model->error, SMALLM_MISTAKE, "threads = %zu is out of range; it must be from 0 to %d", known.threads,
                    MAX_THREADS);
    TRY(read_model(model, file));
    TRY(read_weights(model, file));
    if (model->threads > 1 && (model->pool = pool_new(model->threads)) == NULL)
        return fail(model->error, SMALLM_NO_MEMORY, "cannot start %zu threads here; ask for 1", model->threads);
    model->open = true;
    return SMALLM_OK;
}

static smallm_model *new_model(const char *name)
{
    smallm_model *model = calloc(1, sizeof *model);
    if (model != NULL) snprintf(model->name, sizeof model->name, "%s", name);
    return model;
}

int smallm_version(void) { return 10000 * SMALLM_VERSION_MAJOR + 100 * SMALLM_VERSION_MINOR + SMALLM_VERSION_PATCH; }

smallm_status smallm_open_memory(
    const void *data, size_t bytes, const smallm_open_options *options, smallm_model **model)
{
    if (model == NULL) return SMALLM_MISTAKE;
    *model = new_model("the model");
    if (*model == NULL) return SMALLM_NO_MEMORY;
    if (data == NULL) return fail((*model)->error, SMALLM_MISTAKE, "data is NULL; pass the content of a model.onnx");
    return open_checked(*model, span_of(data, bytes), options);
}

/* fopen for a UTF-8 path; on Windows, whose fopen takes the system's code page, through UTF-16. */
static FILE *open_file(const char *path)
{
#ifdef _WIN32
    wchar_t wide[32768]; /* the longest path of Windows */
    if (MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, 32768) == 0) return NULL;
    return _wfopen(wide, L"rb");
#else
    return fopen(path, "rb");
#endif
}

/* The size of a file; 0 if it is not known, as that of a pipe, or very large. */
static size_t size_of_file(FILE *file)
{
    long end = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : 0;
    if (end != 0 && fseek(file, 0, SEEK_SET) != 0) return 0;
    return end > 0 && end < MAX_KNOWN_SIZE ? (size_t)end : 0;
}

/* Memory for a file, to be freed by `free`. Linux may give large pages, which come faster. */
static uint8_t *file_memory(size_t bytes)
{
#ifdef MADV_HUGEPAGE
    void *memory;
    size_t whole = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    if (bytes < LARGE_PAGE / 2 || posix_memalign(&memory, LARGE_PAGE, whole) != 0) return malloc(bytes);
    madvise(memory, whole, MADV_HUGEPAGE);
    return memory;
#else
    return malloc(bytes);
#endif
}

/* Reads a file or pipe to its end, into memory that the caller frees, and closes it. name: of the file, for messages. */
static smallm_status read_file(smallm_model *model, FILE *file, const char *name, uint8_t **data, size_t *bytes)
{
    size_t room = 0, got = 1, known = size_of_file(file);
    smallm_status status = SMALLM_OK;
    while (status == SMALLM_OK && got > 0) {
        if (*bytes == room) {
            size_t wanted = room > 0 ? 2 * room : known > 0 ? known + 1 : (size_t)1 << 20; /* 1: to meet the end */
            uint8_t *more = room >= MAX_FILE ? NULL : room > 0 ? realloc(*data, wanted) : file_memory(wanted);
            room = wanted;
            if (more == NULL) status = no_memory(model->error);
            else *data = more;
        }
        if (status == SMALLM_OK) *bytes += got = fread(*data + *bytes, 1, room - *bytes, file);
    }
    if (status == SMALLM_OK && ferror(file))
        status = fail(model->error, SMALLM_BAD_MODEL, "cannot read %s to its end; is it a file?", name);
    fclose(file);
    return status;
}

/* Reads the draft table from the content of its file, an array of numpy. A table that is damaged or belongs to a model with
   fewer ids is left aside. */
static smallm_status read_draft_table(smallm_model *m, span file)
{
    static const char TYPE[] = "{'descr': [('context', '<u8'), ('ids', '<u2', (8,)), ('nats', '|u1', (8,))], 'fortran_order': "
                               "False, 'shape': (";
    size_t start = size_of(file) < 10 ? 0 : 10 + file.at[8] + 256 * (size_t)file.at[9], bytes = size_of(file) - start;
    bool good = start >= 10 + sizeof TYPE && start <= size_of(file) && memcmp(file.at, "\x93NUMPY\x01", 7) == 0 &&
                memcmp(file.at + 10, TYPE, sizeof TYPE - 1) == 0 && bytes % sizeof(draft_row) == 0;
    draft_row *rows = good ? reserve(m, m->draft_rows = bytes / sizeof *rows, sizeof *rows) : NULL;
    if (good && rows == NULL) return no_memory(m->error);
    if (good) memcpy(rows, file.at + start, bytes);
    for (size_t i = 0; good && i < m->draft_rows; i++) {
        bool likeliest = false;
        for (int j = 0; j < ALTERNATIVES; j++) {
            good = good && rows[i].ids[j] < m->vocab_size;
            likeliest = likeliest || rows[i].nats[j] == 0;
        }
        good = good && likeliest;
    }
    if (good) m->draft_table = rows;
    return SMALLM_OK;
}

/* Reads the draft table beside the model file, if there is one, and if drafts pay: where reading the weights takes longer
   than the arithmetic, because vectors are wide or the weights come from memory. */
static smallm_status find_draft_table(smallm_model *model, const char *path, size_t model_bytes)
{
    static const char NAME[] = "draft_table.npy";
    size_t folder = strlen(path), wide = model->max_codes > 0 ? 16 : 8; /* codes take less time to read */
    if (model->kernels->lanes < wide && model_bytes < BIG_FILE) return SMALLM_OK;
    while (folder > 0 && path[folder - 1] != '/' && path[folder - 1] != '\\') folder--;
    char *name = malloc(folder + sizeof NAME);
    if (name == NULL) return no_memory(model->error);
    memcpy(name, path, folder);
    memcpy(name + folder, NAME, sizeof NAME);
    FILE *file = open_file(name);
    uint8_t *data = NULL;
    size_t bytes = 0;
    smallm_status status = file != NULL ? read_file(model, file, name, &data, &bytes) : SMALLM_OK;
    if (status == SMALLM_BAD_MODEL) status = SMALLM_OK, bytes = 0, model->error[0] = '\0'; /* it only affects speed */
    if (status == SMALLM_OK && bytes > 0) status = read_draft_table(model, span_of(data, bytes));
    free(data);
    free(name);
    return status;
}

smallm_status smallm_open(const char *path, const smallm_open_options *options, smallm_model **model)
{
    if (model == NULL) return SMALLM_MISTAKE;
    *model = new_model(path == NULL ? "" : path);
    if (*model == NULL) return SMALLM_NO_MEMORY;
    if (path == NULL) return fail((*model)->error, SMALLM_MISTAKE, "path is NULL; give the path of a model.onnx");
    FILE *file = open_file(path);
    if (file == NULL)
        return fail((*model)->error, SMALLM_BAD_MODEL, "cannot read %s; give the path of a model.onnx that export.py wrote",
                    (*model)->name);
    uint8_t *data = NULL;
    size_t bytes = 0;
    smallm_status status = read_file(*model, file, (*model)->name, &data, &bytes);
    if (status == SMALLM_OK) status = open_checked(*model, span_of(data, bytes), options);
    if (status == SMALLM_OK) status = find_draft_table(*model, path, bytes);
    (*model)->open = status == SMALLM_OK;
    free(data);
    return status;
}

const char *smallm_model_error(const smallm_model *model)
{
    return model != NULL ? model->error : "the model is NULL: not enough memory, or NULL was passed";
}

static bool is_open(const smallm_model *model) { return model != NULL && model->open; }

size_t smallm_block_size(const smallm_model *model) { return is_open(model) ? (size_t)model->block_size : 0; }

size_t smallm_vocab_size(const smallm_model *model) { return is_open(model) ? (size_t)model->vocab_size : 0; }

size_t smallm_window(const smallm_model *model) { return is_open(model) ? (size_t)model->window : 0; }

const char *smallm_kernels(const smallm_model *model) { return is_open(model) ? model->kernel_name : ""; }

const char *smallm_metadata(const smallm_model *model, const char *key, size_t *bytes)
{
    span json = {NULL, NULL};
    if (bytes != NULL) *bytes = 0;
    if (!is_open(model) || key == NULL || bytes == NULL) return NULL;
    if (!metadata(span_of(model->metadata, model->metadata_bytes), key, &json)) return NULL;
    *bytes = size_of(json);
    return (const char *)json.at;
}

smallm_status smallm_encode(
    const smallm_model *model, const char *text, size_t bytes, int32_t *ids, size_t capacity, size_t *count)
{
    if (count == NULL) return SMALLM_MISTAKE;
    *count = 0;
    if (!is_open(model) || (text == NULL && bytes > 0) || (ids == NULL && capacity > 0)) return SMALLM_MISTAKE;
    span rest = bytes > 0 ? span_of(text, bytes) : span_of("", 0);
    if (!is_text(rest)) return SMALLM_MISTAKE;
    for (int length; (length = character_length(rest)) > 0; rest.at += length) {
        int32_t found[4];
        int more = spell(model, rest.at, length, found);
        for (int i = 0; i < more; i++, (*count)++)
            if (*count < capacity) ids[*count] = found[i];
    }
    return *count <= capacity ? SMALLM_OK : SMALLM_MISTAKE;
}

smallm_status smallm_decode(
    const smallm_model *model, const int32_t *ids, size_t count, char *text, size_t capacity, size_t *bytes)
{
    pending decoder = {{0}, 0};
    uint8_t byte;
    if (bytes == NULL) return SMALLM_MISTAKE;
    *bytes = 0;
    if (!is_open(model) || (ids == NULL && count > 0) || text == NULL || capacity == 0) return SMALLM_MISTAKE;
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= model->vocab_size || capacity - *bytes <= MAX_PUSHED) return SMALLM_MISTAKE;
        for (span s = bytes_of(model, ids[i], &byte); s.at < s.end; s.at++)
            *bytes += push_byte(&decoder, *s.at, text + *bytes);
    }
    text[*bytes] = '\0';
    return SMALLM_OK;
}

void smallm_close(smallm_model *model)
{
    if (model == NULL) return;
    pool_free(model->pool);
    for (size_t i = 0; i < model->allocation_count; i++) free_aligned(model->allocations[i]);
    void *memory[] = {model->allocations, model->tokens, model->sorted, model->start_text, model->metadata};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free(model);
}

void smallm_context_free(smallm_context *c)
{
    if (c == NULL) return;
    end_sequence(&c->state);
    void *memory[] = {c->keys, c->values, c->stream, c->normed, c->packed, c->scores, c->hidden, c->mixed, c->logits,
                      c->codes, c->code_scales, c->head_codes, c->head_scales, c->history, c->processed, c->sort_keys,
                      c->order, c->spare, c->weights};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free_aligned(memory[i]);
    free(c);
}

smallm_status smallm_context_new(const smallm_model *m, smallm_context **context)
{
    if (context == NULL) return SMALLM_MISTAKE;
    *context = NULL;
    if (!is_open(m)) return SMALLM_MISTAKE;
    smallm_context *c = calloc(1, sizeof *c);
    if (c == NULL) return SMALLM_NO_MEMORY;
    size_t V = m->padded_vocab, cache = (size_t)m->n_layer * (size_t)m->n_kv_head * m->cache_part, R = MAX_ROWS;
    size_t hidden = 2 * m->padded_inner, attended = (size_t)(m->n_head * m->head_dim);
    size_t head_codes = m->ones != NULL ? m->threads * head_room(m) : 0;
    c->model = m;
    c->keys = allocate(cache, sizeof *c->keys);
    c->values = allocate(cache, sizeof *c->values);
    c->stream = allocate(R * (size_t)m->n_embd, sizeof *c->stream);
    c->normed = allocate(R * (size_t)m->n_embd, sizeof *c->normed);
    c->packed = allocate(R * m->heads * (size_t)m->head_dim, sizeof *c->packed);
    c->scores = allocate(m->threads * R * m->positions, sizeof *c->scores);
    c->hidden = allocate(R * (hidden > attended ? hidden : attended), sizeof *c->hidden);
    c->mixed = allocate(m->threads * R * (size_t)m->head_dim, sizeof *c->mixed);
    c->logits = allocate(R * V, sizeof *c->logits);
    c->codes = allocate(R * m->max_codes + 1, sizeof *c->codes);
    c->code_scales = allocate(R * m->max_blocks + 1, sizeof *c->code_scales);
    c->head_codes = allocate(head_codes + 1, sizeof *c->head_codes);
    c->head_scales = allocate(head_codes / 16 + 1, sizeof *c->head_scales);
    c->history = allocate(2 * (size_t)m->block_size + MAX_DRAFTS, sizeof *c->history);
    c->processed = allocate(V, sizeof *c->processed);
    c->sort_keys = allocate(V, sizeof *c->sort_keys);
    c->order = allocate(V, sizeof *c->order);
    c->spare = allocate(V, sizeof *c->spare);
    c->weights = allocate(V, sizeof *c->weights);
    if (c->keys && c->values && c->stream && c->normed && c->packed && c->scores && c->hidden && c->mixed && c->logits &&
        c->codes && c->code_scales && c->head_codes && c->head_scales && c->history && c->processed && c->sort_keys &&
        c->order && c->spare && c->weights) {
        *context = c;
        return SMALLM_OK;
    }
    smallm_context_free(c);
    return SMALLM_NO_MEMORY;
}

smallm_status smallm_context_copy(const smallm_context *from, smallm_context **copy)
{
    if (copy == NULL) return SMALLM_MISTAKE;
    *copy = NULL;
    if (from == NULL) return SMALLM_MISTAKE;
    const smallm_model *m = from->model;
    smallm_context *to;
    TRY(smallm_context_new(m, &to));
    size_t cache = (size_t)m->n_layer * (size_t)m->n_kv_head * m->cache_part;
    memcpy(to->keys, from->keys, cache * sizeof *to->keys);
    memcpy(to->values, from->values, cache * sizeof *to->values);
    memcpy(to->history, from->history, from->state.known * sizeof *to->history);
    if (copy_sequence(m, &from->state, &to->state)) {
        *copy = to;
        return SMALLM_OK;
    }
    smallm_context_free(to);
    return SMALLM_NO_MEMORY;
}

const char *smallm_error(const smallm_context *context)
{
    return context != NULL ? context->error : "the context is NULL: not enough memory, or NULL was passed";
}

void smallm_default_options(const smallm_model *model, smallm_options *options, size_t size)
{
    smallm_options all;
    bool open = is_open(model);
    memset(&all, 0, sizeof all);
    all.size = size;
    all.max_length = 500;
    all.temperature = open ? model->temperature : 0.8;
    all.top_k = open ? model->top_k : 0;
    all.top_p = open ? model->top_p : 1;
    all.min_p = open ? model->min_p : 0;
    all.repetition_penalty = 1;
    all.max_drafts = MAX_DRAFTS;
    all.overflow = open && model->window > 0 ? SMALLM_SLIDE : SMALLM_SHIFT;
    if (options == NULL) return;
    memset(options, 0, size);
    memcpy(options, &all, size < sizeof all ? size : sizeof all);
}

smallm_status smallm_generate_start(
    smallm_context *c, const char *seed, size_t bytes, const smallm_options *options)
{
    if (c == NULL) return SMALLM_MISTAKE;
    c->error[0] = '\0';
    char *chunk = c->state.chunk; /* seed, stops and allowed may point into the chunk that smallm_next returned */
    c->state.chunk = NULL;
    end_sequence(&c->state);
    c->cancelled = 0;
    smallm_status status = start(c, seed, bytes, options);
    if (status != SMALLM_OK) end_sequence(&c->state);
    free(chunk);
    return status;
}

/* The beginning of every call that continues a text. */
static smallm_status begin(smallm_context *c)
{
    if (c == NULL) return SMALLM_MISTAKE;
    c->error[0] = '\0';
    if (c->state.begun) return SMALLM_OK;
    return fail(c->error, SMALLM_MISTAKE, "no text was started; call smallm_generate_start first");
}

smallm_status smallm_take(smallm_context *c, const char **text, size_t *bytes)
{
    if (text != NULL) *text = "";
    if (bytes != NULL) *bytes = 0;
    TRY(begin(c));
    sequence_state *d = &c->state;
    if (text == NULL || bytes == NULL)
        return fail(c->error, SMALLM_MISTAKE, "text or bytes is NULL; pass pointers for the result");
    if (d->ready == 0) return d->done ? SMALLM_DONE : SMALLM_OK;
    memcpy(d->chunk, d->text, d->ready);
    d->chunk[d->ready] = '\0';
    d->chunk_characters = 0;
    for (size_t i = 0; i < d->ready; i += (size_t)sequence_length((uint8_t)d->text[i]))
        d->chunk_logprobs[d->chunk_characters++] = d->logprobs[i];
    memmove(d->text, d->text + d->ready, d->held);
    memmove(d->logprobs, d->logprobs + d->ready, d->held * sizeof *d->logprobs);
    *text = d->chunk;
    *bytes = d->ready;
    d->ready = 0;
    return SMALLM_OK;
}

/* Plans the next pass of a context and computes all of it but the last part. */
static smallm_status prepare_pass(smallm_context *c)
{
    if (c->cancelled) {
        c->cancelled = 0;
        return fail(c->error, SMALLM_CANCELLED, "generation was cancelled; call again to continue");
    }
    plan_pass(c);
    return prefill(c);
}

smallm_status smallm_next(smallm_context *c, const char **text, size_t *bytes)
{
    if (text != NULL) *text = "";
    if (bytes != NULL) *bytes = 0;
    TRY(begin(c));
    while (c->state.ready == 0 && !c->state.done) {
        smallm_status status = prepare_pass(c);
        if (status == SMALLM_OK) status = advance_with_drafts(c);
        if (status == SMALLM_CANCELLED) return status;
        if (status != SMALLM_OK) {
            end_sequence(&c->state);
            return status;
        }
    }
    return smallm_take(c, text, bytes);
}

smallm_status smallm_step(smallm_context *const *contexts, size_t count)
{
    smallm_context *together[MAX_ROWS];
    smallm_status first = SMALLM_DONE;
    size_t held = 0, rows = 0;
    if (contexts == NULL && count > 0) return SMALLM_MISTAKE;
    for (size_t i = 0; i <= count; i++) {
        smallm_status status = SMALLM_OK;
        size_t more = 0;
        if (i < count) {
            smallm_context *c = contexts[i];
            status = begin(c);
            if (status == SMALLM_OK && c->model != contexts[0]->model)
                status = fail(c->error, SMALLM_MISTAKE, "the contexts of a step must have the same model");
            if (status == SMALLM_OK && c->state.done) continue;
            if (status == SMALLM_OK && c->state.room - c->state.ready - c->state.held < MAX_PUSHED)
                status = fail(c->error, SMALLM_MISTAKE, "too much text is waiting; call smallm_take after each step");
            if (status == SMALLM_OK) c->state.drafts = 0, status = prepare_pass(c);
            if (status == SMALLM_OK) more = c->state.wanted - c->state.cached;
        }
        if (held > 0 && (i == count || rows + more > contexts[0]->model->rows)) {
            smallm_status result = advance(together, held);
            if (first <= SMALLM_DONE) first = result;
            held = rows = 0;
        }
        if (status != SMALLM_OK && first <= SMALLM_DONE) first = status;
        if (more > 0) together[held++] = contexts[i], rows += more;
    }
    return first;
}

double smallm_logprob(const smallm_context *context)
{
    double sum = 0;
    for (size_t i = 0; context != NULL && i < context->state.chunk_characters; i++) sum += context->state.chunk_logprobs[i];
    return sum;
}

const double *smallm_logprobs(const smallm_context *context, size_t *count)
{
    if (count != NULL) *count = context != NULL ? context->state.chunk_characters : 0;
    return context != NULL ? context->state.chunk_logprobs : NULL;
}

void smallm_reseed(smallm_context *context, uint32_t rng_seed, uint32_t stream_number)
{
    if (context == NULL) return;
    context->state.key = rng_key(rng_seed, stream_number);
    context->state.draws = 0;
}

void smallm_cancel(smallm_context *context)
{
    if (context != NULL) context->cancelled = 1;
}

smallm_status smallm_next_characters(
    smallm_context *c, const char *text, size_t bytes, smallm_character *found, size_t capacity, size_t *count)
{
    if (count != NULL) *count = 0;
    if (c == NULL) return SMALLM_MISTAKE;
    c->error[0] = '\0';
    if (count == NULL || (found == NULL && capacity > 0))
        return fail(c->error, SMALLM_MISTAKE, "found or count is NULL; pass pointers for the result");
    TRY(check_text(c->error, "text", text, bytes));
    smallm_context *other;
    paths list = {NULL, 0, 0, 0};
    if (smallm_context_new(c->model, &other) != SMALLM_OK) return no_memory(c->error);
    remember_seed(other, bytes > 0 ? span_of(text, bytes) : span_of(c->model->start_text, c->model->start_bytes));
    smallm_status status = find_characters(other, &list, found, capacity, count);
    memcpy(c->error, other->error, sizeof c->error);
    free(list.items);
    smallm_context_free(other);
    return status;
}

smallm_status smallm_score(
    smallm_context *c, const char *text, size_t bytes, double *nats, size_t capacity, size_t *count)
{
    if (count != NULL) *count = 0;
    if (c == NULL) return SMALLM_MISTAKE;
    c->error[0] = '\0';
    if (count == NULL) return fail(c->error, SMALLM_MISTAKE, "count is NULL; pass a pointer for the result");
    TRY(check_text(c->error, "text", text, bytes));
    for (size_t i = 0; i < bytes; i++) *count += !continues((uint8_t)text[i]);
    if (*count == 0) return SMALLM_OK;
    if (nats == NULL || capacity < *count)
        return fail(c->error, SMALLM_MISTAKE, "the text has %zu characters, but nats has room for %zu; pass a larger "
                    "array", *count, nats == NULL ? 0 : capacity);
    scorer r = {NULL, calloc((size_t)c->model->block_size + 1, sizeof *r.ids), 0, nats, 0};
    smallm_status status = r.ids == NULL ? SMALLM_NO_MEMORY : smallm_context_new(c->model, &r.context);
    nats[0] = NAN;
    if (status == SMALLM_OK) {
        status = score(span_of(text, bytes), &r);
        memcpy(c->error, r.context->error, sizeof c->error);
    } else {
        no_memory(c->error);
    }
    smallm_context_free(r.context);
    free(r.ids);
    return status;
}

/* smallm: a character-level language model inside any program.

   Opens a model.onnx that smallm's export.py wrote, and generates or scores text with it:

       smallm_model *model;
       smallm_context *context;
       const char *text;
       size_t bytes;
       if (smallm_open("model.onnx", NULL, &model) != SMALLM_OK) return complain(smallm_model_error(model));
       smallm_context_new(model, &context);
       smallm_generate_start(context, "Once", 4, NULL);
       while (smallm_next(context, &text, &bytes) == SMALLM_OK) fwrite(text, 1, bytes, stdout);
       if (*smallm_error(context)) fprintf(stderr, "%s\n", smallm_error(context));
       smallm_context_free(context);
       smallm_close(model);

   C99 and the C library, nothing else: cc smallm.c your.c -lm. All text is UTF-8 with its length in bytes, so it may hold
   NUL. SAMPLING.md defines the text that a model, a seed text and options give; it is the same text, to the byte, on every
   processor and with every compiler.

   Threads: a model is read-only once it is open, so any number of threads may use it, each with its own context. A context
   is used by one thread at a time, and by any thread; only smallm_cancel may be called from another thread meanwhile.
   Close a model after the last of its contexts. The library has no global state, and allocates no memory while it
   generates.

   With smallm_open_options.threads above 1 the model starts threads, which compute the products and the attention of one
   call together with the thread that called; the text stays the same. They end in smallm_close. While they work for one
   context, calls with other contexts are computed by one thread each. They sleep between calls. A process that was forked
   has none of them and goes on with one thread. */

#ifndef SMALLM_H
#define SMALLM_H

#include <stddef.h>
#include <stdint.h>

#define SMALLM_VERSION_MAJOR 0
#define SMALLM_VERSION_MINOR 2
#define SMALLM_VERSION_PATCH 0

/* For a shared library define SMALLM_SHARED, and SMALLM_BUILD while smallm.c itself is compiled. */
#if !defined(SMALLM_SHARED)
#define SMALLM_API
#elif !defined(_WIN32)
#define SMALLM_API __attribute__((visibility("default")))
#elif defined(SMALLM_BUILD)
#define SMALLM_API __declspec(dllexport)
#else
#define SMALLM_API __declspec(dllimport)
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct smallm_model smallm_model;     /* a loaded model file */
typedef struct smallm_context smallm_context; /* one text, and its KV cache */

/* Returned by most calls. smallm_error has a sentence for each status above SMALLM_DONE. */
typedef enum smallm_status {
    SMALLM_OK = 0,
    SMALLM_DONE = 1,      /* the text is complete */
    SMALLM_MISTAKE = 2,   /* an argument is wrong */
    SMALLM_BAD_MODEL = 3, /* the file is missing, damaged, or not a smallm model */
    SMALLM_NO_MEMORY = 4,
    SMALLM_CANCELLED = 5  /* smallm_cancel was called; the next call continues the text */
} smallm_status;

/* What happens when a text exceeds the model's context of block_size ids; most characters are one id. */
enum {
    SMALLM_CROP = 0,  /* exact: for each id the last block_size ids are recomputed, which is slow */
    SMALLM_SHIFT = 1, /* keeps the newest half of the context whenever it is full, which is fast */
    SMALLM_SLIDE = 2  /* exact and fast, only for models trained with model.window; their default */
};

/* Options begin with their size. A program may be linked with an older or a newer library: fields that the program does
   not have keep their defaults; fields that the library does not know must be 0. */
typedef struct smallm_open_options {
    size_t size;         /* sizeof(smallm_open_options) */
    const char *kernels; /* instruction set: "avx512", "avx2", "sse2", "neon", "wasm" or "plain"; NULL = the fastest */
    size_t threads;      /* number of threads that compute a text together, the caller's included, 0 to 256; 0 and 1: only
                            the caller's thread, the best choice for small models and on cores that are busy; default 1 */
} smallm_open_options;

/* Call smallm_default_options first, then change fields. */
typedef struct smallm_options {
    size_t size;                /* sizeof(smallm_options) */
    int64_t max_length;         /* maximum number of new characters, 0 or more; default 500 */
    double temperature;         /* 0 or more; 0 = always the likeliest id */
    int64_t top_k;              /* sample from the k likeliest ids; 0 = all */
    double top_p;               /* sample from the likeliest ids whose probabilities add up to this; 1 = all */
    double min_p;               /* minimum probability relative to the likeliest id; 0 = all */
    double repetition_penalty;  /* 0.01 to 100; above 1, recent ids become less likely; default 1 = off */
    int64_t repetition_window;  /* number of last ids that the penalty applies to; default 0 = block_size */
    uint32_t rng_seed;          /* equal rng_seed and stream_number give equal text; default 0 */
    uint32_t stream_number;     /* distinguishes texts of the same rng_seed; default 0 */
    const char *const *stops;   /* the text ends before the first of these stop strings (UTF-8; "" is ignored) */
    size_t stop_count;          /* default 0 */
    int64_t min_length;         /* stop strings that begin within so many new characters are ignored; default 0 */
    int32_t overflow;           /* SMALLM_CROP, SMALLM_SHIFT or SMALLM_SLIDE; default: slide if possible, else shift */
    int32_t logprobs;           /* 1 = compute what smallm_logprob returns; default 0 */
    const char *allowed;        /* the only characters that may be generated (UTF-8); default NULL = all */
    const char *banned;         /* characters that are never generated (UTF-8); default NULL = none */
    int32_t max_drafts;         /* speculative decoding: the largest number of draft ids that one pass verifies, 0 to 4;
                                   0 turns speculative decoding off; used only if the model has a draft table; does not
                                   change the text; default 4 */
} smallm_options;

/* -- models -- */

/* The version of the library: 10000 * major + 100 * minor + patch. */
SMALLM_API int smallm_version(void);

/* Opens a model file; path is UTF-8 on every system. Reads draft_table.npy, if export.py left this file in the same folder,
   where it makes generation faster (in fp32 by 1.2 to 1.4 times; the text is the same). options NULL = defaults. *model is
   always set and must be closed by smallm_close; if opening failed, it only holds the error message (NULL if there was no
   memory even for that). */
SMALLM_API smallm_status smallm_open(const char *path, const smallm_open_options *options, smallm_model **model);

/* The same, given the content of such a file, which may be freed when the call returns. */
SMALLM_API smallm_status smallm_open_memory(
    const void *data, size_t bytes, const smallm_open_options *options, smallm_model **model);

/* Why the model did not open, one line; "" if it is open. NULL is allowed. */
SMALLM_API const char *smallm_model_error(const smallm_model *model);

/* The longest context in ids, the number of ids, and the window of attention in ids (0 = the whole context); 0 for a
   model that is not open. */
SMALLM_API size_t smallm_block_size(const smallm_model *model);
SMALLM_API size_t smallm_vocab_size(const smallm_model *model);
SMALLM_API size_t smallm_window(const smallm_model *model);

/* The instruction set in use, a name as in smallm_open_options; "" for a model that is not open. */
SMALLM_API const char *smallm_kernels(const smallm_model *model);

/* A value of the file's metadata, as JSON, for example of "smallm.training"; it lives as long as the model. NULL and 0 bytes
   if the key is missing. */
SMALLM_API const char *smallm_metadata(const smallm_model *model, const char *key, size_t *bytes);

/* The ids of a text. ids has room for `capacity` of them; `bytes` is always enough. *count = number of ids, even if
   capacity is too small, which is SMALLM_MISTAKE, as is text that is not UTF-8. */
SMALLM_API smallm_status smallm_encode(
    const smallm_model *model, const char *text, size_t bytes, int32_t *ids, size_t capacity, size_t *count);

/* The text of ids, invalid bytes as U+FFFD; a NUL that is not counted follows. text has room for `capacity` bytes with the
   NUL; 24 for each id, and 1, are always enough. SMALLM_MISTAKE for too little room and for ids that do not exist. */
SMALLM_API smallm_status smallm_decode(
    const smallm_model *model, const int32_t *ids, size_t count, char *text, size_t capacity, size_t *bytes);

/* Frees a model. NULL is allowed. */
SMALLM_API void smallm_close(smallm_model *model);

/* -- contexts -- */

/* A new context of an open model. *context is NULL if the call fails. */
SMALLM_API smallm_status smallm_context_new(const smallm_model *model, smallm_context **context);

/* A copy that continues independently from where the text of `context` is now: keep it as a snapshot, or branch. */
SMALLM_API smallm_status smallm_context_copy(const smallm_context *context, smallm_context **copy);

/* The error message of the last call with this context, one line; "" if the call succeeded. NULL is allowed. */
SMALLM_API const char *smallm_error(const smallm_context *context);

/* Frees a context. NULL is allowed. */
SMALLM_API void smallm_context_free(smallm_context *context);

/* -- generating -- */

/* Sets options to the defaults of this model, whose temperature, top_k, top_p and min_p are in the file; model NULL =
   general defaults. size = sizeof(smallm_options). */
SMALLM_API void smallm_default_options(const smallm_model *model, smallm_options *options, size_t size);

/* Begins a text after this seed text; bytes = 0 is the start of a text. options NULL = defaults. Ends the previous text,
   if any. Nothing is computed yet. seed and options, and what they point to, may be freed when the call returns; they may
   point into the chunk that smallm_next returned. */
SMALLM_API smallm_status smallm_generate_start(
    smallm_context *context, const char *seed, size_t bytes, const smallm_options *options);

/* Returns the next chunk of new text (without the seed): one or more whole characters and a NUL that is not counted.
   The chunk is valid until the next call with this context. SMALLM_DONE: the text is complete. Invalid bytes become
   U+FFFD. */
SMALLM_API smallm_status smallm_next(smallm_context *context, const char **text, size_t *bytes);

/* Computes the next id of each context that is not complete. The contexts, all different and of one model, read its
   weights once together. Fetch the text with smallm_take. Returns the first status above SMALLM_DONE, SMALLM_DONE if all
   texts are complete, else SMALLM_OK. Two to four contexts at a time, to the end of their texts, are the fastest where more
   KV caches exceed the caches of the processor. */
SMALLM_API smallm_status smallm_step(smallm_context *const *contexts, size_t count);

/* The text that is certain and was not returned yet, as smallm_next, but computes nothing: bytes may be 0. SMALLM_DONE: the
   text is complete and nothing is left. */
SMALLM_API smallm_status smallm_take(smallm_context *context, const char **text, size_t *bytes);

/* With options.logprobs: ln of the probability of the last chunk, at temperature 1 with all characters allowed. */
SMALLM_API double smallm_logprob(const smallm_context *context);

/* The same for each character of the last chunk; *count = number of characters. Valid as long as the chunk. */
SMALLM_API const double *smallm_logprobs(const smallm_context *context, size_t *count);

/* The text continues with other random numbers, those of this rng_seed and stream_number: for a copy of a context. */
SMALLM_API void smallm_reseed(smallm_context *context, uint32_t rng_seed, uint32_t stream_number);

/* Stops a call of smallm_next or smallm_step in another thread as soon as possible; if no call is running, the next one
   for this text stops. That call returns SMALLM_CANCELLED, and the text can be continued. */
SMALLM_API void smallm_cancel(smallm_context *context);

/* -- measuring: these calls do not affect the text that a context is generating -- */

typedef struct smallm_character {
    char text[5];       /* UTF-8 and a NUL */
    double probability; /* at temperature 1 */
} smallm_character;

/* The most likely characters after a text, the most likely first. found has room for `capacity` characters; *count =
   number of characters written. A character of several ids is missing if it is less likely than 1e-6. */
SMALLM_API smallm_status smallm_next_characters(
    smallm_context *context, const char *text, size_t bytes, smallm_character *found, size_t capacity, size_t *count);

/* Surprisal in nats (-ln of the probability) of each character of a text, in adjacent windows of block_size ids; NaN for
   the first character, which has no context. nats has room for `capacity` numbers, one per character; `bytes` is always
   enough. *count = number of characters, even if capacity is too small, which is SMALLM_MISTAKE. */
SMALLM_API smallm_status smallm_score(
    smallm_context *context, const char *text, size_t bytes, double *nats, size_t capacity, size_t *count);

#ifdef __cplusplus
}
#endif

#endif

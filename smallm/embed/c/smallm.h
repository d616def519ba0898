/* smallm: a character-level language model inside any program.

   Opens a model.onnx that smallm's export.py wrote, and generates or scores text with it:

       smallm *model;
       if (smallm_open("model.onnx", NULL, &model) == SMALLM_OK &&
           smallm_generate_start(model, "Once", 4, NULL) == SMALLM_OK) {
           const char *text;
           size_t bytes;
           while (smallm_next(model, &text, &bytes) == SMALLM_OK) fwrite(text, 1, bytes, stdout);
       }
       if (*smallm_error(model)) fprintf(stderr, "%s\n", smallm_error(model));
       smallm_close(model);

   C99; needs ONNX Runtime 1.21 or newer and nothing else. All text is UTF-8 with its length in bytes, so it may hold
   NUL. The same model, seed text and options give the same text as smallm's Python package; SAMPLING.md defines it.

   Threads: a handle may be used by one thread at a time, and by any thread. Handles share nothing, so several threads can
   work with one handle each. There are no globals. ONNX Runtime reads environment variables while a model is opened: do
   not change the environment at that time. (ORT_GQA_DISABLE_FLASH_ATTENTION=1 selects the attention kernel that smallm's
   Python package uses; set it before threads are started, as main.c does, see README.md.) */

#ifndef SMALLM_H
#define SMALLM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A loaded model, and the text that it is generating, if any. */
typedef struct smallm smallm;

/* Returned by every call. smallm_error has a message for every status except the first two. */
typedef enum smallm_status {
    SMALLM_OK = 0,
    SMALLM_DONE = 1,      /* smallm_next: the text is complete */
    SMALLM_MISTAKE = 2,   /* an argument is wrong */
    SMALLM_BAD_MODEL = 3, /* the file is missing, damaged, or not a smallm model */
    SMALLM_NO_MEMORY = 4,
    SMALLM_FAILED = 5     /* ONNX Runtime failed, or is too old */
} smallm_status;

typedef struct smallm_open_options {
    size_t size;     /* sizeof(smallm_open_options); smaller and larger structs of other versions are accepted */
    int32_t threads; /* number of compute threads, 1 to 1024; 0 = chosen by the size of the model */
} smallm_open_options;

/* What happens when a text exceeds the model's context of block_size ids; most characters are one id. */
enum {
    SMALLM_CROP = 0, /* exact: for each id the last block_size ids are recomputed, which is slow */
    SMALLM_SHIFT = 1, /* keeps the newest half of the context whenever it is full, which is fast */
    SMALLM_SLIDE = 2  /* exact and fast, only for models trained with model.window; their default */
};

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
    const char *allowed;        /* the only characters that may be generated (UTF-8); default NULL = all */
    const char *banned;         /* characters that are never generated (UTF-8); default NULL = none */
} smallm_options;

/* Opens a model file. options NULL = defaults. *model is always set and must be closed by smallm_close; if opening
   failed, it only holds the error message (NULL if there was no memory even for that). */
smallm_status smallm_open(const char *path, const smallm_open_options *options, smallm **model);

/* The same, given the content of such a file, which may be freed when the call returns. */
smallm_status smallm_open_memory(const void *data, size_t bytes, const smallm_open_options *options, smallm **model);

/* Sets options to the defaults of this model, whose temperature, top_k, top_p and min_p are in the file; model NULL =
   general defaults. size = sizeof(smallm_options): further fields of a newer library keep their defaults. */
void smallm_default_options(const smallm *model, smallm_options *options, size_t size);

/* Begins a text after this seed text; bytes = 0 is the start of a text. options NULL = defaults. Ends the previous text,
   if any. Nothing is computed yet. seed and options, and what they point to, may be freed when the call returns; they may
   point into the chunk that smallm_next returned. */
smallm_status smallm_generate_start(smallm *model, const char *seed, size_t bytes, const smallm_options *options);

/* Returns the next chunk of new text (without the seed): one or more whole characters and a NUL that is not counted.
   The chunk is valid until the next call with this handle. SMALLM_DONE: the text is complete. Invalid UTF-8 becomes
   U+FFFD. Allocates no memory, apart from ONNX Runtime's allocations. */
smallm_status smallm_next(smallm *model, const char **text, size_t *bytes);

/* Surprisal in nats (-ln of the probability) of each character of a text, in adjacent windows of block_size ids; NaN for
   the first character, which has no context. nats has room for `capacity` numbers, one per character; `bytes` is always
   enough. *count = number of characters, even if capacity is too small. A text that is being generated is not affected. */
smallm_status smallm_score(
    smallm *model, const char *text, size_t bytes, double *nats, size_t capacity, size_t *count);

/* The longest context in ids, and the number of ids. 0 for a model that is not open. */
size_t smallm_block_size(const smallm *model);
size_t smallm_vocab_size(const smallm *model);

/* The error message of the last call, one line; "" if the call succeeded. NULL as a handle is allowed. */
const char *smallm_error(const smallm *model);

/* Frees everything. NULL is allowed. */
void smallm_close(smallm *model);

#ifdef __cplusplus
}
#endif

#endif

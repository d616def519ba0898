/* smallm: a character-level language model inside any program.

   Opens a model.onnx that smallm's export.py wrote, and lets it write or measure text:

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

   Threads: a handle is for one thread at a time. It does not matter which one, and different handles have nothing in
   common, so several threads use one handle each. There are no globals. ONNX Runtime reads environment variables while
   a model is opened: do not change the environment meanwhile. (With ORT_GQA_DISABLE_FLASH_ATTENTION=1 in it attention
   goes the way it does in smallm's Python package; set it before there are threads, as main.c does, see README.md.) */

#ifndef SMALLM_H
#define SMALLM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A loaded model, and the text that it is writing, if any. */
typedef struct smallm smallm;

/* What every call returns. On all but the first two, smallm_error has a sentence about it. */
typedef enum smallm_status {
    SMALLM_OK = 0,
    SMALLM_DONE = 1,      /* smallm_next: the text has come to its end */
    SMALLM_MISTAKE = 2,   /* an argument is wrong */
    SMALLM_BAD_MODEL = 3, /* the file is missing, damaged, or no smallm model */
    SMALLM_NO_MEMORY = 4,
    SMALLM_FAILED = 5     /* ONNX Runtime failed, or is too old */
} smallm_status;

typedef struct smallm_open_options {
    size_t size;     /* sizeof(smallm_open_options) */
    int32_t threads; /* that compute, 1 to 1024; 0 = as many as suit the model */
} smallm_open_options;

/* What happens when the text outgrows the model's context of block_size ids (characters, mostly). */
enum {
    SMALLM_CROP = 0, /* the model sees exactly the last block_size ids: a whole window is computed for each */
    SMALLM_SHIFT = 1, /* it goes on with the newest half of the window whenever that is full: costs nothing more */
    SMALLM_SLIDE = 2  /* only for models trained with model.window, exact, and costs nothing more; their default */
};

/* Let smallm_default_options fill it in, then change what you like. */
typedef struct smallm_options {
    size_t size;                /* sizeof(smallm_options) */
    int64_t max_length;         /* most characters of new text, 0 or more; default 500 */
    double temperature;         /* 0 or more; 0 = always the likeliest */
    int64_t top_k;              /* choose from the k likeliest ids; 0 = all */
    double top_p;               /* choose from the likeliest ids that make up this probability; 1 = all */
    double min_p;               /* least probability, relative to the likeliest id's; 0 = all */
    double repetition_penalty;  /* 0.01 to 100; above 1, ids that came up lately become less likely; default 1 = off */
    int64_t repetition_window;  /* how many of the last ids it looks at, seed included; 0 (default) = block_size */
    uint32_t rng_seed;          /* equal rng_seed and stream_number give equal text; default 0 */
    uint32_t stream_number;     /* tells several texts of one rng_seed apart; default 0 */
    const char *const *stops;   /* the text ends before the first of these (each UTF-8, ended by NUL; "" is none) */
    size_t stop_count;          /* default 0 */
    int64_t min_length;         /* a stop that begins within so many new characters is text like any other; default 0 */
    int32_t overflow;           /* SMALLM_CROP, SMALLM_SHIFT or SMALLM_SLIDE; default: slide if it can, else crop */
    const char *allowed;        /* the only characters that may be written (UTF-8, ended by NUL); default NULL = all */
    const char *banned;         /* characters that are not written (the same); default NULL = none */
} smallm_options;

/* Opens a model file. options NULL = defaults. *model is set in any case, to be closed by smallm_close: where opening
   failed it only tells why (NULL if not even memory for that was left). */
smallm_status smallm_open(const char *path, const smallm_open_options *options, smallm **model);

/* The same from the content of such a file, which is not needed any more when this returns. */
smallm_status smallm_open_memory(const void *data, size_t bytes, const smallm_open_options *options, smallm **model);

/* Fills in the options of this model, whose temperature, top_k, top_p and min_p come from the file; NULL = general
   defaults. size = sizeof(smallm_options): what a newer library knows beyond it keeps its default. */
void smallm_default_options(const smallm *model, smallm_options *options, size_t size);

/* Begins a text after this seed text; empty (bytes = 0) = the start of a text. options NULL = defaults. Ends the text
   before, if any. Nothing is computed yet. What seed and options point to is not needed any more when this returns. */
smallm_status smallm_generate_start(smallm *model, const char *seed, size_t bytes, const smallm_options *options);

/* The next piece of new text (without the seed): one or more whole characters, ended by a NUL that is not counted.
   Valid until the next call with this handle. SMALLM_DONE: there is no more. Bytes that are not UTF-8 come out as
   U+FFFD. Takes no memory from the heap, apart from what ONNX Runtime does itself. */
smallm_status smallm_next(smallm *model, const char **text, size_t *bytes);

/* Nats (-ln of the probability) of each character of a text, in windows of block_size ids side by side; that of the
   first is NaN, since nothing comes before it. nats has room for `capacity` numbers: one per character, so `bytes` of
   them always do. *count = characters, also if there was too little room. Leaves a text that is being written alone. */
smallm_status smallm_score(
    smallm *model, const char *text, size_t bytes, double *nats, size_t capacity, size_t *count);

/* Longest context in ids; number of ids. 0 for a model that is not open. */
size_t smallm_block_size(const smallm *model);
size_t smallm_vocab_size(const smallm *model);

/* One line on what went wrong in the last call, and what to do; "" if nothing did. NULL as a handle is allowed. */
const char *smallm_error(const smallm *model);

/* Gives everything back. NULL is allowed. */
void smallm_close(smallm *model);

#ifdef __cplusplus
}
#endif

#endif

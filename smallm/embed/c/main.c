/* A useful example of smallm.h: generates text, or scores a text.

       ./smallm_generate [MODEL] --seed "Once" --rng-seed 1
       ./smallm_generate [MODEL] --score FILE

   Results go to stdout, everything else to stderr; an error is one line and exit code 2. Arguments and texts are UTF-8, also on
   Windows, where lines end in LF as elsewhere: the same call writes the same bytes on every system. */

#include "smallm.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#include <shellapi.h>
#ifdef _MSC_VER
#pragma comment(lib, "shell32") /* CommandLineToArgvW */
#endif
#endif

static const char USAGE[] =
    "usage: smallm_generate [MODEL] [options]          MODEL: default model.onnx\n"
    "\n"
    "  --seed TEXT, --seed-file FILE            the text to continue; FILE - is stdin\n"
    "  --max-length N                           maximum number of new characters; default 500\n"
    "  --temperature T --top-k K --top-p P --min-p P   sampling; default: the values in the model file\n"
    "  --repetition-penalty R --repetition-window N    makes the last N ids less likely\n"
    "  --rng-seed N --stream-number N           equal numbers give equal text; default: the time\n"
    "  --stop TEXT                              ends the text before TEXT; may be repeated\n"
    "  --min-length N                           ignores stop strings within the first N characters\n"
    "  --allowed CHARACTERS --banned CHARACTERS the only characters to generate; characters never to generate\n"
    "  --overflow crop|shift|slide              past the context: exact; fast (default); both (with a window)\n"
    "  --max-drafts N                           next ids to guess at once, 0 to 4; default 4; the text is the same\n"
    "  --kernels avx512|avx2|sse2|neon|plain    instruction set; default: the fastest\n"
    "  --threads N                              threads that compute the text together; default 1\n"
    "  --score FILE                             prints the mean nats per character of FILE instead\n";

enum { MAX_STOPS = 64 };

typedef struct {
    const char *model, *seed, *seed_file, *score, *stops[MAX_STOPS];
    smallm_options given; /* `set` holds the fields that were given */
    unsigned set;
    smallm_open_options open;
} arguments;

enum { SET_TEMPERATURE = 1, SET_TOP_K = 2, SET_TOP_P = 4, SET_MIN_P = 8, SET_RNG_SEED = 16, SET_OVERFLOW = 32 };

static int complain(const char *what, const char *about)
{
    fprintf(stderr, "smallm: %s%s\n", what, about);
    return 2;
}

/* Reads an integer from lowest to highest; false for anything else. */
static int whole(const char *text, long long lowest, long long highest, long long *value)
{
    char *end;
    errno = 0;
    *value = strtoll(text, &end, 10);
    return end != text && *end == '\0' && errno == 0 && *value >= lowest && *value <= highest;
}

static int real(const char *text, double *value)
{
    char *end;
    *value = strtod(text, &end);
    return end != text && *end == '\0';
}

/* Reads one option and its value; false for an invalid value. */
static int read_option(arguments *a, const char *name, const char *value, int *known)
{
    smallm_options *o = &a->given;
    long long n = 0;
    int good = 1;
    *known = 1;
    if (strcmp(name, "--seed") == 0) a->seed = value;
    else if (strcmp(name, "--seed-file") == 0) a->seed_file = value;
    else if (strcmp(name, "--score") == 0) a->score = value;
    else if (strcmp(name, "--allowed") == 0) o->allowed = value;
    else if (strcmp(name, "--banned") == 0) o->banned = value;
    else if (strcmp(name, "--max-length") == 0) good = whole(value, INT64_MIN, INT64_MAX, &n), o->max_length = n;
    else if (strcmp(name, "--min-length") == 0) good = whole(value, INT64_MIN, INT64_MAX, &n), o->min_length = n;
    else if (strcmp(name, "--temperature") == 0) good = real(value, &o->temperature), a->set |= SET_TEMPERATURE;
    else if (strcmp(name, "--top-k") == 0)
        good = whole(value, INT64_MIN, INT64_MAX, &n), o->top_k = n, a->set |= SET_TOP_K;
    else if (strcmp(name, "--top-p") == 0) good = real(value, &o->top_p), a->set |= SET_TOP_P;
    else if (strcmp(name, "--min-p") == 0) good = real(value, &o->min_p), a->set |= SET_MIN_P;
    else if (strcmp(name, "--repetition-penalty") == 0) good = real(value, &o->repetition_penalty);
    else if (strcmp(name, "--repetition-window") == 0)
        good = whole(value, INT64_MIN, INT64_MAX, &n), o->repetition_window = n;
    else if (strcmp(name, "--rng-seed") == 0)
        good = whole(value, 0, UINT32_MAX, &n), o->rng_seed = (uint32_t)n, a->set |= SET_RNG_SEED;
    else if (strcmp(name, "--stream-number") == 0)
        good = whole(value, 0, UINT32_MAX, &n), o->stream_number = (uint32_t)n;
    else if (strcmp(name, "--max-drafts") == 0)
        good = whole(value, INT32_MIN, INT32_MAX, &n), o->max_drafts = (int32_t)n;
    else if (strcmp(name, "--kernels") == 0) a->open.kernels = value;
    else if (strcmp(name, "--threads") == 0) good = whole(value, 1, 256, &n), a->open.threads = (size_t)n;
    else if (strcmp(name, "--overflow") == 0) {
        static const char *const ways[] = {"crop", "shift", "slide"}; /* in the order of smallm.h */
        for (o->overflow = 0; o->overflow < 3 && strcmp(value, ways[o->overflow]) != 0;) o->overflow++;
        good = o->overflow < 3;
        a->set |= SET_OVERFLOW;
    } else if (strcmp(name, "--stop") == 0) {
        good = o->stop_count < MAX_STOPS;
        if (good) a->stops[o->stop_count++] = value;
    } else {
        *known = 0;
    }
    return good;
}

/* Returns 0 to continue, otherwise the exit code + 1. */
static int read_arguments(int argc, char **argv, arguments *a)
{
    memset(a, 0, sizeof *a);
    smallm_default_options(NULL, &a->given, sizeof a->given);
    a->open.size = sizeof a->open;
    a->given.stops = a->stops;
    for (int i = 1; i < argc; i++) {
        int known;
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            fputs(USAGE, stdout);
            return 1;
        }
        if (argv[i][0] != '-') {
            if (a->model != NULL) return complain("more than one model; see --help: ", argv[i]) + 1;
            a->model = argv[i];
            continue;
        }
        if (i + 1 == argc) return complain("unknown option, or its value is missing; see --help: ", argv[i]) + 1;
        int good = read_option(a, argv[i], argv[i + 1], &known);
        if (!known) return complain("unknown option; see --help: ", argv[i]) + 1;
        if (!good) return complain("invalid value, or too many values; see --help: ", argv[i]) + 1;
        i++;
    }
    if (a->model == NULL) a->model = "model.onnx";
    return 0;
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

/* Reads a whole file into memory that the caller frees; NULL if the file cannot be read. */
static char *read_file(const char *path, size_t *bytes)
{
    FILE *file = strcmp(path, "-") == 0 ? stdin : open_file(path);
    char *data = NULL, *more;
    size_t room = 0, got = 1;
    *bytes = 0;
    while (file != NULL && got > 0) {
        if (*bytes == room && (more = realloc(data, room = room == 0 ? 65536 : 2 * room)) != NULL) data = more;
        else if (*bytes == room) break;
        *bytes += got = fread(data + *bytes, 1, room - *bytes, file);
    }
    int failed = file == NULL || ferror(file) || got > 0;
    if (file != NULL && file != stdin) fclose(file);
    if (!failed) return data;
    free(data);
    return NULL;
}

static int print_score(smallm_context *context, const char *text, size_t bytes)
{
    double *nats = bytes < SIZE_MAX / sizeof *nats ? malloc((bytes + 1) * sizeof *nats) : NULL, sum = 0;
    size_t count = 0;
    if (nats == NULL) return complain("there is not enough memory for this text", "");
    smallm_status status = smallm_score(context, text, bytes, nats, bytes, &count);
    for (size_t i = 1; status == SMALLM_OK && i < count; i++) sum += nats[i];
    free(nats);
    if (status != SMALLM_OK) return complain(smallm_error(context), "");
    if (count < 2) return complain("a text needs at least 2 characters to be scored", "");
    double mean = sum / (double)(count - 1);
    printf("%.6f nats per character, %.6f bits, perplexity %.6f, %zu characters\n", mean, mean / log(2.0), exp(mean),
           count - 1);
    return 0;
}

static int print_text(smallm_context *context, const char *seed, size_t bytes, const smallm_options *options)
{
    const char *text;
    size_t length;
    smallm_status status = smallm_generate_start(context, seed, bytes, options);
    if (status == SMALLM_OK) fwrite(seed, 1, bytes, stdout);
    while (status == SMALLM_OK && (status = smallm_next(context, &text, &length)) == SMALLM_OK) {
        fwrite(text, 1, length, stdout);
        fflush(stdout);
        if (ferror(stdout)) return complain("cannot write the text", "");
    }
    if (status != SMALLM_DONE) return complain(smallm_error(context), "");
    putchar('\n');
    return 0;
}

/* The options of the command line, and the defaults of the model for all others. */
static smallm_options options_for(const smallm_model *model, const arguments *a)
{
    smallm_options defaults, options = a->given;
    smallm_default_options(model, &defaults, sizeof defaults);
    if (!(a->set & SET_TEMPERATURE)) options.temperature = defaults.temperature;
    if (!(a->set & SET_TOP_K)) options.top_k = defaults.top_k;
    if (!(a->set & SET_TOP_P)) options.top_p = defaults.top_p;
    if (!(a->set & SET_MIN_P)) options.min_p = defaults.min_p;
    if (!(a->set & SET_OVERFLOW)) options.overflow = defaults.overflow;
    if (!(a->set & SET_RNG_SEED)) options.rng_seed = (uint32_t)time(NULL);
    return options;
}

static int perform(int argc, char **argv)
{
    arguments a;
    smallm_model *model = NULL;
    smallm_context *context = NULL;
    size_t bytes = 0;
    int code = read_arguments(argc, argv, &a);
    if (code != 0) return code - 1;
    if (smallm_open(a.model, &a.open, &model) != SMALLM_OK) {
        code = complain(smallm_model_error(model), "");
        smallm_close(model);
        return code;
    }
    const char *path = a.score != NULL ? a.score : a.seed_file;
    char *file = path != NULL ? read_file(path, &bytes) : NULL;
    if (path != NULL && file == NULL) {
        code = complain("cannot read ", path);
    } else if (smallm_context_new(model, &context) != SMALLM_OK) {
        code = complain("there is not enough memory for this; use a smaller model", "");
    } else if (a.score != NULL) {
        code = print_score(context, file, bytes);
    } else {
        smallm_options options = options_for(model, &a);
        const char *seed = file != NULL ? file : a.seed != NULL ? a.seed : "";
        code = print_text(context, seed, file != NULL ? bytes : strlen(seed), &options);
    }
    free(file);
    smallm_context_free(context);
    smallm_close(model);
    return code;
}

#ifdef _WIN32

/* The arguments in UTF-8, which the caller frees: those of `main` are in the system's code page, and lack characters that it
   does not have. NULL if memory is short. */
static char **utf8_arguments(int *argc)
{
    wchar_t *line = GetCommandLineW(), **wide = CommandLineToArgvW(line, argc);
    if (wide == NULL) return NULL;
    size_t pointers = ((size_t)*argc + 1) * sizeof(char *), room = 3 * (wcslen(line) + 1) + (size_t)*argc;
    char **argv = calloc(pointers + room, 1), *at = (char *)argv + pointers;
    for (int i = 0; argv != NULL && i < *argc; i++) {
        argv[i] = at;
        at += WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, at, (int)room, NULL, NULL);
    }
    LocalFree(wide);
    return argv;
}

int main(void)
{
    int argc;
    UINT code_page = GetConsoleOutputCP();
    char **argv = utf8_arguments(&argc);
    if (argv == NULL) return complain("there is not enough memory", "");
    SetConsoleOutputCP(CP_UTF8);
    setvbuf(stdout, NULL, _IOFBF, 1 << 16); /* a console shows characters whose bytes come in one call */
    setvbuf(stderr, NULL, _IOFBF, 1 << 12);
    for (int file = 0; file < 3; file++) _setmode(file, _O_BINARY);
    int code = perform(argc, argv);
    fflush(NULL);
    SetConsoleOutputCP(code_page);
    free(argv);
    return code;
}

#else

int main(int argc, char **argv) { return perform(argc, argv); }

#endif

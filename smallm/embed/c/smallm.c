/* The implementation of smallm.h in C99, over the C API of ONNX Runtime.

   In this order: bytes and text; the vocabulary; JSON; the check of the ONNX file; the manifest; ONNX Runtime and the KV
   cache; the sampler; allowed characters; the state of a text; scoring; the public functions. SAMPLING.md specifies the
   text that results. The Python package has the same parts in model_file/onnx_reader.py, model_file/manifest.py,
   inference/kv_cache.py, generation/sampler.py, generation/allowed_characters.py and generation/sequence_state.py. */

#include "smallm.h"

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#include <windows.h>
#else
#include <unistd.h>
#endif

#include <onnxruntime_c_api.h>

#ifdef __FAST_MATH__
#error "smallm.c must not be compiled with -ffast-math: the same seed would not give the same text"
#endif

enum {
    ORT_API_WANTED = 21, /* in ONNX Runtime 1.21 and later */
    FORMAT_VERSION = 1,
    MAX_LAYERS = 999,
    MAX_START_IDS = 999,
    MAX_NODES = 20000,
    MAX_DIMENSIONS = 8,
    PLAIN_INPUTS = 3,  /* besides the cache */
    MAX_THREADS = 1024,
    MAX_NAME = 40,    /* bytes of an input's name, with its NUL */
    MAX_PUSHED = 24,  /* bytes of text that an id can complete: each of its 4 bytes can give two U+FFFD */
    CODE_POINTS = 0x110000,
    BIG_LAYER = 1000000 /* bytes; in smaller layers a second thread slows down single ids */
};
#define MAX_SIZE (1 << 24)
#define MAX_SAMPLING 9007199254740992.0 /* 2^53 */
#define MAX_FILE 0x7fffffffu            /* bytes: the limit of protobuf */
#define MAX_SMALL_CACHE (64u << 20)           /* bytes of KV cache that a file of any size may ask for */
#define MIN_TEMPERATURE 1e-200 /* a lower temperature changes nothing, but a division could overflow */

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

/* A stop string, and the length in bytes of its longest prefix that the text ends with (Knuth, Morris, Pratt 1977). */
typedef struct {
    const uint8_t *word;
    size_t length, matched;
    size_t *borders; /* for each prefix of word: length of its longest proper prefix that is also its suffix */
} stop;

/* The state of the text that is being generated. */
typedef struct {
    smallm_options options;
    bool begun, done;
    uint32_t key, draws;
    int64_t length;            /* number of new characters */
    size_t known, cached;      /* ids in history; ids in the KV cache */
    pending decoder;
    stop *stops;
    uint8_t *words;            /* memory of the stop strings */
    uint64_t *characters;      /* (CODE_POINTS / 64): a bit per character, 1 = allowed; NULL = all are allowed */
    bool *allowed;             /* (vocab_size): whether an id may follow the bytes in `allowed_after` */
    pending allowed_after;
    size_t *borders;
    char *text;                /* characters that are certain, then the possible beginning of a stop string */
    char *chunk;               /* the text that smallm_next returned last */
    size_t ready, held, room;  /* bytes of `text` that are certain; that are held back; that it has room for */
} sequence_state;

struct smallm {
    char error[600];
    char name[256]; /* the name of the model in messages */
    bool open;

    /* The manifest. */
    int32_t block_size, n_layer, n_head, n_kv_head, n_embd, head_dim, vocab_size, window;
    double rope_theta, temperature, top_p, min_p;
    int64_t top_k;
    token *tokens, *sorted; /* by id; by bytes */
    size_t token_count;
    uint8_t *start_text;
    size_t start_bytes;

    /* ONNX Runtime and its inputs and outputs. Shapes: L n_layer, V vocab_size, T block_size. */
    const OrtApi *ort;
    OrtEnv *env;
    OrtSession *session;
    OrtMemoryInfo *memory;
    OrtIoBinding *binding;
    OrtValue **past;       /* (2 L): keys and values of each layer; past and present share the memory */
    OrtValue *no_past;     /* an empty tensor */
    char (*past_names)[MAX_NAME]; /* (2 L) */
    const char **names;    /* (3 + 2 L): names of all inputs */
    const OrtValue **values; /* (3 + 2 L): their values for a pass without a cache */
    OrtValue *ids_value;   /* the bound ids, and their number: */
    size_t ids_bound;
    OrtValue *mask_value, *keep_value, *logits_value;
    float *cache;          /* (2 L, n_kv_head, T, head_dim) */
    float *rotation;       /* (head_dim): cosines, then sines, that rotate keys back when the cache slides */
    int64_t *mask, *ids;   /* (T) */
    int64_t keep;
    float *logits;         /* (V): the logits of the next id */

    /* The text, and buffers for choosing its next id. */
    int64_t *history;      /* (2 T): the last T ids or more, if there are so many */
    float *processed;      /* (V): logits after repetition penalty and allowed characters */
    uint64_t *keys, *order, *spare; /* (V): sort keys of the ids; sorted keys; buffer for sorting */
    double *weights;       /* (V) */
    sequence_state state;
};

/* Stores the error message, without control characters, and returns the status. */
static smallm_status fail(smallm *model, smallm_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(model->error, sizeof model->error, format, arguments);
    va_end(arguments);
    for (char *c = model->error; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = ' ';
    return status;
}

static smallm_status no_memory(smallm *model)
{
    return fail(model, SMALLM_NO_MEMORY, "there is not enough memory for this; use a smaller model");
}

static smallm_status bad_model(smallm *model, const char *reason)
{
    return fail(model, SMALLM_BAD_MODEL, "%s is not a smallm model: %s; write one with export.py", model->name,
                reason);
}

static smallm_status broken_metadata(smallm *model)
{
    return fail(model, SMALLM_BAD_MODEL, "%s has broken metadata; export the model again", model->name);
}

static smallm_status not_finite(smallm *model)
{
    return fail(model, SMALLM_BAD_MODEL, "the model's logits are not finite: its weights are broken; train it again");
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
static int64_t find_id(const smallm *model, const uint8_t *bytes, int length)
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
static int spell(const smallm *model, const uint8_t *bytes, int length, int64_t ids[4])
{
    int count = 0, first = length;
    while ((ids[0] = find_id(model, bytes, first)) < 0) first--;
    for (count = 1; first < length; first++) ids[count++] = bytes[first];
    return count;
}

static bool begins_character(int64_t id) { return id < 0x80 || id >= 0xC0; }

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
static bool is_vocabulary(const smallm *model)
{
    for (size_t i = 0; i < model->token_count; i++) {
        const token *t = &model->tokens[i], *next = t + 1;
        if (i > 0 && compare_tokens(&model->sorted[i - 1], &model->sorted[i]) == 0) return false;
        if (t->length > 2) {
            int64_t prefix = find_id(model, t->bytes, t->length - 1);
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
static bool sort_tokens(smallm *model)
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
    double power = pow(10.0, exponent < 0 ? -exponent : exponent);
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

/* -- the ONNX file, checked before ONNX Runtime parses it, since files may come from untrusted sources --

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

/* The operators that smallm exports, now (and, the last two, in earlier versions). No control flow, nothing random. */
static const char OPERATORS[] =
    " Add ArgMax Cast Concat ConstantOfShape Div Expand Gather Greater GroupQueryAttention Less MatMul MatMulNBits Max Mul"
    " Or QuickGelu Range ReduceMean Reshape ScatterElements Shape Sigmoid SimplifiedLayerNormalization"
    " SkipSimplifiedLayerNormalization Slice Softmax Split Sqrt Squeeze Sub Tile Transpose Unsqueeze Where Neg ReduceSum ";

enum { ONNX_FLOAT = 1, ONNX_INT64 = 7, ONNX_TYPES = 23 };
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
static bool read_sampling(smallm *model, span file)
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
static bool read_window(smallm *model, span file)
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

static smallm_status read_vocabulary(smallm *model, span file)
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
    return enough ? SMALLM_OK : no_memory(model);
}

/* The number of ids of a text. */
static size_t count_ids(const smallm *model, span text)
{
    size_t count = 0;
    int64_t ids[4];
    for (int length; (length = character_length(text)) > 0; text.at += length)
        count += (size_t)spell(model, text.at, length, ids);
    return count;
}

static smallm_status read_manifest(smallm *model, span file)
{
    span json;
    int32_t version = 0;
    if (!has_metadata(file)) return bad_model(model, "it has no smallm metadata");
    if (!metadata(file, "smallm.format_version", &json) || !json_size(json, &version) || version != FORMAT_VERSION)
        return fail(model, SMALLM_BAD_MODEL, "%s has another format version; this smallm.c reads %d: export the model "
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
    if (model->start_text == NULL) return no_memory(model);
    span start = span_of(model->start_text, model->start_bytes);
    size_t ids = is_text(start) ? count_ids(model, start) : 0;
    return ids >= 1 && ids <= MAX_START_IDS ? SMALLM_OK : broken_metadata(model);
}

/* Refuses a model that would need far more memory than the size of its file justifies: an element of the embedding takes
   at least half a byte in the file, a position of the RoPE tables one byte per channel. */
static smallm_status check_size(smallm *model, size_t file_bytes)
{
    uint64_t file = file_bytes, block_size = (uint64_t)model->block_size, head_dim = (uint64_t)model->head_dim;
    double cache = 8.0 * model->n_layer * model->n_kv_head * model->head_dim * model->block_size; /* bytes */
    if ((uint64_t)model->vocab_size * (uint64_t)model->n_embd / 2 <= file && block_size * head_dim <= file &&
        cache <= MAX_SMALL_CACHE + 64.0 * (double)file && cache <= (double)(SIZE_MAX / 2))
        return SMALLM_OK;
    return fail(model, SMALLM_BAD_MODEL, "%s is too small for the sizes in its metadata; export the model again",
                model->name);
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
static bool is_expected(const smallm *model, span value, int number)
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

static smallm_status check_values(smallm *model, span graph)
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
    return fail(model, SMALLM_BAD_MODEL, "%s: inputs and outputs do not match its metadata; export the model again",
                model->name);
}

/* Checks the content of the file and reads its manifest. */
static smallm_status read_model(smallm *model, span file)
{
    if (size_of(file) == 0 || !conforms(file, MODEL))
        return fail(model, SMALLM_BAD_MODEL, "%s is truncated or not an ONNX model; export the model again",
                    model->name);
    span graph = only(file, 7).bytes;
    const char *problem = size_of(graph) == 0 ? "it has no graph" : graph_problem(graph);
    if (problem != NULL) return bad_model(model, problem);
    smallm_status status = read_manifest(model, file);
    if (status == SMALLM_OK) status = check_size(model, size_of(file));
    return status == SMALLM_OK ? check_values(model, graph) : status;
}

/* -- ONNX Runtime and the KV cache -- */

/* Converts and releases a status of ONNX Runtime; NULL is SMALLM_OK. */
static smallm_status done(smallm *model, OrtStatus *status)
{
    if (status == NULL) return SMALLM_OK;
    const char *message = model->ort->GetErrorMessage(status);
    smallm_status kind = fail(
        model, SMALLM_FAILED, "%s is broken, export the model again, or it needs a newer ONNX Runtime than this (%s), "
        "which says: %.*s", model->name, OrtGetApiBase()->GetVersionString(), (int)strcspn(message, "\n"), message);
    model->ort->ReleaseStatus(status);
    return kind;
}

/* Returns from the function if ONNX Runtime fails. */
#define TRY(call)                                     \
    do {                                              \
        smallm_status status_ = done(model, (call));  \
        if (status_ != SMALLM_OK) return status_;     \
    } while (0)

static int32_t default_threads(size_t layer_bytes)
{
    long processors = 1;
    if (layer_bytes < BIG_LAYER) return 1;
#ifdef _WIN32
    SYSTEM_INFO information;
    GetSystemInfo(&information);
    processors = (long)information.dwNumberOfProcessors;
#elif defined(_SC_NPROCESSORS_ONLN)
    processors = sysconf(_SC_NPROCESSORS_ONLN);
#endif
    return processors / 2 > 4 ? 4 : processors / 2 < 2 ? 2 : (int32_t)(processors / 2);
}

static smallm_status create_session(smallm *model, OrtSessionOptions *options, span file, int32_t threads)
{
    const OrtApi *ort = model->ort;
    TRY(ort->AddSessionConfigEntry(options, "session.load_model_format", "ONNX")); /* the format that was checked */
    TRY(ort->SetIntraOpNumThreads(options, threads));
    TRY(ort->SetInterOpNumThreads(options, 1));
    TRY(ort->SetSessionLogSeverityLevel(options, ORT_LOGGING_LEVEL_FATAL)); /* errors are returned as a status */
    TRY(ort->CreateSessionFromArray(model->env, file.at, size_of(file), options, &model->session));
    return SMALLM_OK;
}

static smallm_status open_session(smallm *model, span file, int32_t threads)
{
    model->ort = OrtGetApiBase()->GetApi(ORT_API_WANTED);
    if (model->ort == NULL)
        return fail(model, SMALLM_FAILED, "this is ONNX Runtime %s, but smallm needs 1.%d or newer; install a newer one",
                    OrtGetApiBase()->GetVersionString(), ORT_API_WANTED);
    OrtSessionOptions *options = NULL;
    TRY(model->ort->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "smallm", &model->env));
    TRY(model->ort->CreateSessionOptions(&options));
    smallm_status status = create_session(model, options, file, threads);
    model->ort->ReleaseSessionOptions(options);
    return status;
}

/* A tensor over memory that smallm owns. */
static smallm_status tensor(
    smallm *model, void *data, size_t bytes, const int64_t *shape, size_t dimensions, bool whole, OrtValue **value)
{
    TRY(model->ort->CreateTensorWithDataAsOrtValue(
        model->memory, data, bytes, shape, dimensions,
        whole ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, value));
    return SMALLM_OK;
}

#define TRY_OWN(call)                              \
    do {                                           \
        smallm_status status_ = (call);            \
        if (status_ != SMALLM_OK) return status_;  \
    } while (0)

static const char *cache_name(char name[MAX_NAME], const char *side, int number)
{
    snprintf(name, MAX_NAME, "%s.%d.%s", side, number / 2, number % 2 == 0 ? "key" : "value");
    return name;
}

static smallm_status allocate(smallm *model)
{
    size_t T = (size_t)model->block_size, V = (size_t)model->vocab_size, parts = 2 * (size_t)model->n_layer;
    size_t layer = T * (size_t)model->n_kv_head * (size_t)model->head_dim; /* check_size keeps the product small */
    model->past = calloc(parts, sizeof *model->past);
    model->past_names = calloc(parts, sizeof *model->past_names);
    model->names = calloc(PLAIN_INPUTS + parts, sizeof *model->names);
    model->values = calloc(PLAIN_INPUTS + parts, sizeof *model->values);
    model->cache = calloc(parts * layer, sizeof *model->cache);
    model->rotation = calloc((size_t)model->head_dim, sizeof *model->rotation);
    model->mask = calloc(T, sizeof *model->mask);
    model->ids = calloc(T, sizeof *model->ids);
    model->history = calloc(2 * T, sizeof *model->history);
    model->logits = calloc(V, sizeof *model->logits);
    model->processed = calloc(V, sizeof *model->processed);
    model->keys = calloc(V, sizeof *model->keys);
    model->order = calloc(V, sizeof *model->order);
    model->spare = calloc(V, sizeof *model->spare);
    model->weights = calloc(V, sizeof *model->weights);
    bool enough = model->past && model->past_names && model->names && model->values && model->cache && model->rotation &&
                  model->mask && model->ids && model->history && model->logits && model->processed &&
                  model->keys && model->order && model->spare && model->weights;
    return enough ? SMALLM_OK : no_memory(model);
}

/* Computes the rotation of keys that move from the end of a full cache to its beginning. */
static void prepare_rotation(smallm *model)
{
    int32_t half = model->head_dim / 2, moved = model->block_size - (model->window - 1);
    for (int32_t i = 0; i < half; i++) {
        double angle = moved * pow(model->rope_theta, -(double)i / half);
        model->rotation[i] = (float)cos(angle);
        model->rotation[half + i] = (float)sin(angle);
    }
}

/* Binds all inputs and outputs once. Past and present share one buffer, so a pass copies nothing, and the mask has the
   length of the cache, with zeros at its end: from one id to the next only its elements change. */
static smallm_status bind(smallm *model)
{
    const OrtApi *ort = model->ort;
    int64_t T = model->block_size, V = model->vocab_size;
    int64_t cache[4] = {1, model->n_kv_head, T, model->head_dim}, row[2] = {1, T}, logits[3] = {1, 1, V};
    size_t layer = (size_t)(cache[1] * cache[2] * cache[3]);
    char present[MAX_NAME];
    TRY_OWN(allocate(model));
    if (model->window > 0) prepare_rotation(model);
    TRY(ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &model->memory));
    TRY(ort->CreateIoBinding(model->session, &model->binding));
    for (int i = 0; i < 2 * model->n_layer; i++) {
        float *part = model->cache + (size_t)i * layer;
        TRY_OWN(tensor(model, part, layer * sizeof *part, cache, 4, false, &model->past[i]));
        model->names[PLAIN_INPUTS + i] = cache_name(model->past_names[i], "past_key_values", i);
        TRY(ort->BindInput(model->binding, model->past_names[i], model->past[i]));
        TRY(ort->BindOutput(model->binding, cache_name(present, "present", i), model->past[i]));
    }
    cache[2] = 0;
    TRY_OWN(tensor(model, model->cache, 0, cache, 4, false, &model->no_past));
    TRY_OWN(tensor(model, model->mask, (size_t)T * sizeof *model->mask, row, 2, true, &model->mask_value));
    TRY_OWN(tensor(model, &model->keep, sizeof model->keep, NULL, 0, true, &model->keep_value));
    TRY_OWN(tensor(model, model->logits, (size_t)V * sizeof *model->logits, logits, 3, false, &model->logits_value));
    model->keep = 1;
    model->names[0] = "input_ids", model->names[1] = "attention_mask", model->names[2] = "num_logits_to_keep";
    TRY(ort->BindInput(model->binding, model->names[1], model->mask_value));
    TRY(ort->BindInput(model->binding, model->names[2], model->keep_value));
    TRY(ort->BindOutput(model->binding, "logits", model->logits_value));
    return SMALLM_OK;
}

/* Computes the logits after `count` ids in `model->ids`; the cache holds the ids before. */
static smallm_status run(smallm *model, size_t count)
{
    const OrtApi *ort = model->ort;
    if (model->ids_bound != count) {
        int64_t shape[2] = {1, (int64_t)count};
        if (model->ids_value != NULL) ort->ReleaseValue(model->ids_value);
        model->ids_value = NULL, model->ids_bound = 0;
        TRY_OWN(tensor(model, model->ids, count * sizeof *model->ids, shape, 2, true, &model->ids_value));
        TRY(ort->BindInput(model->binding, model->names[0], model->ids_value));
        model->ids_bound = count;
    }
    TRY(ort->RunWithBinding(model->session, NULL, model->binding));
    return SMALLM_OK;
}

/* Rotates one key back, in single precision. Separate statements keep compilers from fusing products and sums. */
static void rotate_back(float *key, const float *rotation, size_t half)
{
    for (size_t i = 0; i < half; i++) {
        float low_cos = key[i] * rotation[i], high_sin = key[half + i] * rotation[half + i];
        float high_cos = key[half + i] * rotation[i], low_sin = key[i] * rotation[half + i];
        key[i] = low_cos + high_sin;
        key[half + i] = high_cos - low_sin;
    }
}

/* Moves the part of a full cache that the model's window still covers to the beginning of the cache. The logits that
   follow equal those of an unlimited cache: RoPE attention depends on distances only (Su et al. 2021). */
static void slide(smallm *model)
{
    size_t T = (size_t)model->block_size, width = (size_t)model->head_dim, kept = (size_t)model->window - 1;
    size_t heads = (size_t)model->n_kv_head;
    for (size_t part = 0; part < 2 * (size_t)model->n_layer * heads; part++) { /* heads of keys, of values, of keys ... */
        float *rows = model->cache + part * T * width;
        memmove(rows, rows + (T - kept) * width, kept * width * sizeof *rows);
        for (size_t row = 0; row < kept && part / heads % 2 == 0; row++)
            rotate_back(rows + row * width, model->rotation, width / 2);
    }
    for (size_t i = kept; i < T; i++) model->mask[i] = 0;
    model->state.cached = kept;
}

/* Computes the logits after the text so far, into model->logits. */
static smallm_status predict(smallm *model)
{
    sequence_state *d = &model->state;
    size_t T = (size_t)model->block_size;
    if (d->cached == T && d->options.overflow == SMALLM_SLIDE) slide(model);
    if (d->cached > 0 && d->cached < T) {
        model->ids[0] = model->history[d->known - 1];
        model->mask[d->cached++] = 1;
        return run(model, 1);
    }
    /* The cache is empty: read the seed. Or it is full: read the ids that `overflow` keeps. */
    size_t window = d->cached == 0 || d->options.overflow == SMALLM_CROP ? T : T / 2 > 1 ? T / 2 : 1;
    if (window > d->known) window = d->known;
    memcpy(model->ids, model->history + (d->known - window), window * sizeof *model->ids);
    for (size_t i = 0; i < T; i++) model->mask[i] = i < window;
    d->cached = window;
    return run(model, window);
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

static double uniform(sequence_state *d)
{
    return (double)(draw(d->key, ++d->draws) >> 8) / 16777216.0;
}

/* Writes the logits into model->processed, with the repetition penalty on the given ids. */
static void apply_repetition_penalty(smallm *model, const float *logits, const int64_t *ids, size_t count, double penalty)
{
    float p = (float)penalty;
    memcpy(model->processed, logits, (size_t)model->vocab_size * sizeof *logits);
    for (size_t i = 0; i < count && p != 1.0f; i++) {
        float x = logits[ids[i]];
        model->processed[ids[i]] = x > 0 ? x / p : x * p;
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
static void make_keys(smallm *model)
{
    for (size_t id = 0; id < (size_t)model->vocab_size; id++)
        model->keys[id] = (uint64_t)descending(model->processed[id]) << 32 | id;
}

/* The key with a rank, from 0, byte by byte from the highest; takes the same time for all logits. */
static uint64_t key_at(const smallm *model, size_t rank)
{
    size_t V = (size_t)model->vocab_size, id = 0;
    uint64_t found = 0;
    for (int shift = 56; shift >= 32; shift -= 8) {
        size_t counts[256] = {0};
        uint64_t byte = 0;
        for (size_t i = 0; i < V; i++) {
            uint64_t rest = (model->keys[i] ^ found) >> shift;
            if (rest < 256) counts[rest]++;
        }
        for (; counts[byte] <= rank; byte++) rank -= counts[byte];
        found |= byte << shift;
    }
    while (model->keys[id] >> 32 != found >> 32 || rank-- > 0) id++;
    return model->keys[id];
}

/* Sorts the keys up to `last` into model->order by a radix sort. Returns their number. */
static size_t rank(smallm *model, uint64_t last)
{
    size_t count = 0;
    for (size_t i = 0; i < (size_t)model->vocab_size; i++)
        if (model->keys[i] <= last) model->order[count++] = model->keys[i];
    for (int shift = 32; shift < 64; shift += 8) { /* the sort is stable, so equal logits stay in the order of the ids */
        size_t starts[257] = {0};
        for (size_t i = 0; i < count; i++) starts[(model->order[i] >> shift & 0xFF) + 1]++;
        for (int i = 0; i < 256; i++) starts[i + 1] += starts[i];
        for (size_t i = 0; i < count; i++) model->spare[starts[model->order[i] >> shift & 0xFF]++] = model->order[i];
        uint64_t *sorted = model->spare;
        model->spare = model->order, model->order = sorted;
    }
    return count;
}

static double weight(double logit, double largest, double temperature)
{
    return exp((logit - largest) / (temperature > MIN_TEMPERATURE ? temperature : MIN_TEMPERATURE));
}

/* top-p: the last key of the shortest ranking prefix that has top_p of the weight of the keys up to `last`. */
static uint64_t last_of_share(smallm *model, uint64_t last, double largest, const smallm_options *options)
{
    size_t count = rank(model, last), taken = 0;
    double total = 0, sum = 0;
    for (size_t i = 0; i < count; i++) {
        model->weights[i] = weight(model->processed[model->order[i] & 0xFFFFFFFFu], largest, options->temperature);
        total += model->weights[i];
    }
    for (double share = options->top_p * total; (sum += model->weights[taken]) < share && taken + 1 < count;) taken++;
    return model->order[taken];
}

/* The id that u in [0, 1) selects from model->processed; -1 if the logits are not finite. */
static int64_t sample(smallm *model, double u, const smallm_options *options)
{
    size_t likeliest = 0, V = (size_t)model->vocab_size, taken = 0;
    for (size_t i = 0; i < V; i++) {
        if (isnan(model->processed[i])) return -1;
        if (model->processed[i] > model->processed[likeliest]) likeliest = i;
    }
    double largest = model->processed[likeliest], sum = 0;
    if (!isfinite(largest)) return -1;
    if (options->temperature == 0) return (int64_t)likeliest;
    uint64_t last = UINT64_MAX; /* the last key that is kept */
    make_keys(model);
    if (options->top_k > 0 && (uint64_t)options->top_k < V) last = key_at(model, (size_t)options->top_k - 1);
    if (options->top_p < 1) last = last_of_share(model, last, largest, options);
    for (size_t i = 0; i < V; i++) {
        double one = model->keys[i] <= last ? weight(model->processed[i], largest, options->temperature) : 0;
        model->weights[i] = sum += one >= options->min_p ? one : 0;
    }
    for (double share = u * sum; model->weights[taken] <= share;) taken++; /* u < 1, so the loop ends */
    return (int64_t)taken;
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

static span bytes_of(const smallm *model, int64_t id, uint8_t *byte)
{
    *byte = (uint8_t)id;
    return id < 256 ? span_of(byte, 1) : span_of(model->tokens[id - 256].bytes, model->tokens[id - 256].length);
}

/* Whether an id may follow the bytes of an incomplete character. */
static bool is_allowed(const smallm *model, const uint64_t *characters, pending unfinished, int64_t id)
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

static void find_allowed(const smallm *model, sequence_state *d)
{
    for (int32_t id = 0; id < model->vocab_size; id++)
        d->allowed[id] = is_allowed(model, d->characters, d->decoder, id);
    d->allowed_after = d->decoder;
}

/* Sets ids that are not allowed to minus infinity in model->processed, or to NaN if their logit is infinite. */
static void apply_allowed(smallm *model)
{
    sequence_state *d = &model->state;
    if (d->characters == NULL) return;
    if (d->decoder.length != d->allowed_after.length ||
        memcmp(d->decoder.bytes, d->allowed_after.bytes, (size_t)d->decoder.length) != 0)
        find_allowed(model, d);
    for (size_t i = 0; i < (size_t)model->vocab_size; i++)
        if (!d->allowed[i]) model->processed[i] = model->logits[i] - INFINITY;
}

/* -- the state of a text -- */

/* Adds an id to the history, of which at least the last block_size ids are kept. */
static void remember(smallm *model, int64_t id)
{
    size_t T = (size_t)model->block_size;
    if (model->state.known == 2 * T) {
        memmove(model->history, model->history + T, T * sizeof *model->history);
        model->state.known = T;
    }
    model->history[model->state.known++] = id;
}

static void remember_seed(smallm *model, span seed)
{
    size_t T = (size_t)model->block_size, characters = 0;
    const uint8_t *at = seed.end; /* start of the last T characters, which have at least T ids */
    while (at > seed.at && characters < T) characters += !continues(*--at);
    int64_t ids[4];
    model->state.known = 0;
    for (seed.at = at; seed.at < seed.end;) {
        int length = character_length(seed), count = spell(model, seed.at, length, ids);
        for (int i = 0; i < count; i++) remember(model, ids[i]);
        seed.at += length;
    }
    size_t surplus = model->state.known > T ? model->state.known - T : 0;
    memmove(model->history, model->history + surplus, (model->state.known - surplus) * sizeof *model->history);
    model->state.known -= surplus;
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
static void add_character(sequence_state *d, const char *character, size_t bytes)
{
    size_t met = 0, begun = 0;
    memcpy(d->text + d->ready + d->held, character, bytes);
    d->held += bytes;
    for (size_t i = 0; i < d->options.stop_count && d->length >= d->options.min_length; i++) {
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

/* Adds an id to the text. */
static void push(smallm *model, int64_t id)
{
    sequence_state *d = &model->state;
    char text[MAX_PUSHED];
    size_t bytes = 0;
    uint8_t byte;
    remember(model, id);
    for (span s = bytes_of(model, id, &byte); s.at < s.end; s.at++)
        bytes += push_byte(&d->decoder, *s.at, text + bytes);
    for (size_t at = 0; at < bytes && !d->done;) {
        size_t length = (size_t)sequence_length((uint8_t)text[at]);
        add_character(d, text + at, length);
        at += length;
    }
}

/* Computes and chooses the next id. */
static smallm_status advance(smallm *model)
{
    sequence_state *d = &model->state;
    const smallm_options *o = &d->options;
    TRY_OWN(predict(model));
    size_t seen = o->repetition_window > 0 ? (size_t)o->repetition_window : (size_t)model->block_size;
    if (seen > d->known) seen = d->known;
    apply_repetition_penalty(model, model->logits, model->history + (d->known - seen), seen, o->repetition_penalty);
    apply_allowed(model);
    int64_t id = sample(model, uniform(d), o);
    if (id < 0) return not_finite(model);
    push(model, id);
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
    free(d->chunk);
    memset(d, 0, sizeof *d);
}

/* Copies options over their defaults. Options of an older program are shorter; those of a newer program are longer, and
   the fields that this library does not know must be 0. Both kinds of options begin with their size. */
static smallm_status read_options(smallm *model, const void *given, void *options, size_t known)
{
    size_t size;
    memcpy(&size, given, sizeof size);
    if (size < sizeof size) return fail(model, SMALLM_MISTAKE, "options.size is not set; set it to sizeof options");
    for (size_t i = known; i < size; i++)
        if (((const uint8_t *)given)[i] != 0)
            return fail(model, SMALLM_MISTAKE, "options has a field that this smallm.c does not know; use a newer one");
    memcpy(options, given, size < known ? size : known);
    memcpy(options, &known, sizeof known);
    return SMALLM_OK;
}

/* Completes the caller's options by defaults. */
static smallm_status resolve(smallm *model, const smallm_options *given, smallm_options *options)
{
    smallm_default_options(model, options, sizeof *options);
    return given == NULL ? SMALLM_OK : read_options(model, given, options, sizeof *options);
}

static smallm_status out_of_range(smallm *model, const char *name, double value, const char *rule)
{
    return fail(model, SMALLM_MISTAKE, "%s = %.17g is out of range; it must be %s", name, value, rule);
}

static smallm_status check_options(smallm *model, const smallm_options *o)
{
    if (!(o->temperature >= 0 && isfinite(o->temperature)))
        return out_of_range(model, "temperature", o->temperature, "0 or more (0 = the likeliest character)");
    if (o->top_k < 0) return out_of_range(model, "top_k", (double)o->top_k, "0 or more (0 = all ids)");
    if (!(o->top_p > 0 && o->top_p <= 1))
        return out_of_range(model, "top_p", o->top_p, "above 0 and at most 1 (1 = all ids)");
    if (!(o->min_p >= 0 && o->min_p <= 1)) return out_of_range(model, "min_p", o->min_p, "from 0 to 1 (0 = all ids)");
    if (!(o->repetition_penalty >= 0.01 && o->repetition_penalty <= 100))
        return out_of_range(model, "repetition_penalty", o->repetition_penalty, "from 0.01 to 100 (1 = off)");
    if (o->repetition_window < 0 || o->repetition_window > model->block_size)
        return out_of_range(model, "repetition_window", (double)o->repetition_window,
                            "from 0 to block_size (0 = block_size)");
    if (o->max_length < 0) return out_of_range(model, "max_length", (double)o->max_length, "0 or more");
    if (o->min_length < 0) return out_of_range(model, "min_length", (double)o->min_length, "0 or more");
    if (o->min_length > o->max_length)
        return fail(model, SMALLM_MISTAKE, "min_length = %lld is more than max_length = %lld; lower min_length",
                    (long long)o->min_length, (long long)o->max_length);
    if (o->overflow != SMALLM_CROP && o->overflow != SMALLM_SHIFT && o->overflow != SMALLM_SLIDE)
        return out_of_range(model, "overflow", o->overflow, "SMALLM_CROP, SMALLM_SHIFT or SMALLM_SLIDE");
    if (o->overflow == SMALLM_SLIDE && model->window == 0)
        return fail(model, SMALLM_MISTAKE, "overflow = SMALLM_SLIDE needs a model that was trained with model.window; "
                    "use SMALLM_CROP or SMALLM_SHIFT");
    return SMALLM_OK;
}

static smallm_status check_text(smallm *model, const char *what, const char *text, size_t bytes)
{
    if (text == NULL && bytes > 0) return fail(model, SMALLM_MISTAKE, "the %s is NULL; pass its text", what);
    if (bytes == 0) return SMALLM_OK;
    size_t valid = (size_t)(valid_until(span_of(text, bytes)) - (const uint8_t *)text);
    if (valid == bytes) return SMALLM_OK;
    return fail(model, SMALLM_MISTAKE, "the %s is not UTF-8 from byte %zu on; convert it", what, valid);
}

/* Copies the stop strings except empty ones, and allocates room for the text that they may hold back. */
static smallm_status prepare_stops(smallm *model, sequence_state *d)
{
    size_t total = 0, longest = 0, count = 0;
    const char *const *given = d->options.stops;
    if (d->options.stop_count > 0 && given == NULL)
        return fail(model, SMALLM_MISTAKE, "stops is NULL; pass the stop strings, or stop_count = 0");
    for (size_t i = 0; i < d->options.stop_count; i++) {
        size_t length = given[i] == NULL ? 0 : strlen(given[i]);
        TRY_OWN(check_text(model, "stop", given[i], given[i] == NULL ? 1 : length));
        total += length;
        longest = length > longest ? length : longest;
        count += length > 0;
    }
    d->room = longest + 2 * MAX_PUSHED;
    d->text = calloc(d->room + 1, 1);
    d->chunk = calloc(d->room + 1, 1);
    d->stops = calloc(count + 1, sizeof *d->stops);
    d->words = calloc(total + 1, 1);
    d->borders = calloc(total + 1, sizeof *d->borders);
    if (!(d->text && d->chunk && d->stops && d->words && d->borders)) return no_memory(model);
    size_t at = 0, number = 0;
    for (size_t i = 0; i < d->options.stop_count; i++) {
        stop *s = &d->stops[number];
        if ((s->length = strlen(given[i])) == 0) continue;
        s->word = memcpy(d->words + at, given[i], s->length);
        s->borders = d->borders + at;
        prepare_stop(s);
        at += s->length;
        number++;
    }
    d->options.stops = NULL;
    d->options.stop_count = count;
    return SMALLM_OK;
}

/* Builds the set of allowed characters unless all are allowed, and finds the ids that may come first. */
static smallm_status prepare_allowed(smallm *model, sequence_state *d)
{
    const char *allowed = d->options.allowed, *banned = d->options.banned == NULL ? "" : d->options.banned;
    d->options.allowed = d->options.banned = NULL;
    if (allowed == NULL && *banned == '\0') return SMALLM_OK;
    if (allowed != NULL) TRY_OWN(check_text(model, "option allowed", allowed, strlen(allowed)));
    TRY_OWN(check_text(model, "option banned", banned, strlen(banned)));
    d->characters = calloc(CODE_POINTS / 64, sizeof *d->characters);
    d->allowed = calloc((size_t)model->vocab_size, sizeof *d->allowed);
    if (d->characters == NULL || d->allowed == NULL) return no_memory(model);
    if (allowed == NULL) memset(d->characters, 0xFF, CODE_POINTS / 8);
    else set_characters(d->characters, span_of(allowed, strlen(allowed)), true);
    set_characters(d->characters, span_of(banned, strlen(banned)), false);
    memset(d->characters + 0xD800 / 64, 0, 0x800 / 8); /* surrogates are not characters */
    if (!has_any(d->characters, 0, CODE_POINTS))
        return fail(model, SMALLM_MISTAKE, "allowed and banned leave no character; allow one that is not banned");
    find_allowed(model, d);
    return SMALLM_OK;
}

static smallm_status start(smallm *model, const char *seed, size_t bytes, const smallm_options *options)
{
    sequence_state *d = &model->state;
    TRY_OWN(resolve(model, options, &d->options));
    TRY_OWN(check_options(model, &d->options));
    TRY_OWN(check_text(model, "seed text", seed, bytes));
    TRY_OWN(prepare_stops(model, d));
    TRY_OWN(prepare_allowed(model, d));
    remember_seed(model, bytes > 0 ? span_of(seed, bytes) : span_of(model->start_text, model->start_bytes));
    d->key = rng_key(d->options.rng_seed, d->options.stream_number);
    d->done = d->options.max_length == 0;
    d->begun = true;
    return SMALLM_OK;
}

/* -- scoring -- */

/* Surprisal of a target in nats, from the logits (V); not finite if the logits are not. */
static double nats(const float *logits, size_t V, int64_t target)
{
    float largest = logits[0];
    double total = 0;
    for (size_t i = 0; i < V; i++)
        if (!(logits[i] <= largest)) largest = logits[i];
    for (size_t i = 0; i < V; i++) total += exp((double)logits[i] - (double)largest);
    return log(total) - ((double)logits[target] - (double)largest);
}

/* Computes the logits of ids (T) without a cache. */
static smallm_status run_window(smallm *model, int64_t *ids, int64_t *ones, size_t T, OrtValue **value)
{
    const OrtApi *ort = model->ort;
    static const char *const output[] = {"logits"};
    OrtValue *inputs[PLAIN_INPUTS] = {NULL, NULL, NULL};
    int64_t row[2] = {1, (int64_t)T}, keep = 0;
    size_t count = PLAIN_INPUTS + 2 * (size_t)model->n_layer;
    for (size_t i = 0; i < T; i++) ones[i] = 1;
    smallm_status status = tensor(model, ids, T * sizeof *ids, row, 2, true, &inputs[0]);
    if (status == SMALLM_OK) status = tensor(model, ones, T * sizeof *ones, row, 2, true, &inputs[1]);
    if (status == SMALLM_OK) status = tensor(model, &keep, sizeof keep, NULL, 0, true, &inputs[2]);
    for (size_t i = 0; i < count; i++) model->values[i] = i < PLAIN_INPUTS ? inputs[i] : model->no_past;
    if (status == SMALLM_OK)
        status = done(model, ort->Run(model->session, NULL, model->names, model->values, count, output, 1, value));
    for (int i = 0; i < PLAIN_INPUTS; i++)
        if (inputs[i] != NULL) ort->ReleaseValue(inputs[i]);
    return status;
}

/* The data of an output that must be logits (1, T, V). */
static smallm_status logits_of(smallm *model, OrtValue *value, size_t T, float **logits)
{
    const OrtApi *ort = model->ort;
    OrtTensorTypeAndShapeInfo *information = NULL;
    size_t dimensions = 0;
    int64_t shape[3] = {0, 0, 0};
    TRY(ort->GetTensorTypeAndShape(value, &information));
    smallm_status status = done(model, ort->GetDimensionsCount(information, &dimensions));
    if (status == SMALLM_OK && dimensions == 3) status = done(model, ort->GetDimensions(information, shape, 3));
    ort->ReleaseTensorTypeAndShapeInfo(information);
    TRY_OWN(status);
    if (shape[0] != 1 || shape[1] != (int64_t)T || shape[2] != model->vocab_size)
        return fail(model, SMALLM_FAILED, "%s is broken, export the model again: its logits have the wrong shape",
                    model->name);
    TRY(ort->GetTensorMutableData(value, (void **)logits));
    return SMALLM_OK;
}

/* The state of scoring a text: one window of its ids. */
typedef struct {
    int64_t *ids;  /* (T + 1) */
    int64_t *ones; /* (T): a mask */
    size_t held;
    double *nats; /* of each character */
    size_t character; /* index of the last scored character */
} scorer;

/* Scores the targets of a window, and begins the next window with the last of them. */
static smallm_status measure(smallm *model, scorer *r)
{
    OrtValue *value = NULL;
    float *logits = NULL;
    size_t V = (size_t)model->vocab_size;
    if (r->held < 2) return SMALLM_OK;
    smallm_status status = run_window(model, r->ids, r->ones, r->held - 1, &value);
    if (status == SMALLM_OK) status = logits_of(model, value, r->held - 1, &logits);
    for (size_t i = 1; status == SMALLM_OK && i < r->held; i++) {
        if (begins_character(r->ids[i])) r->nats[++r->character] = 0;
        double found = nats(logits + (i - 1) * V, V, r->ids[i]);
        if (!isfinite(found))
            status = not_finite(model);
        r->nats[r->character] += found; /* the first character stays NaN */
    }
    if (value != NULL) model->ort->ReleaseValue(value);
    r->ids[0] = r->ids[r->held - 1];
    r->held = 1;
    return status;
}

static smallm_status score(smallm *model, span text, scorer *r)
{
    size_t T = (size_t)model->block_size;
    int64_t ids[4];
    while (text.at < text.end) {
        int length = character_length(text), count = spell(model, text.at, length, ids);
        for (int i = 0; i < count; i++) {
            r->ids[r->held++] = ids[i];
            if (r->held == T + 1) TRY_OWN(measure(model, r));
        }
        text.at += length;
    }
    return measure(model, r);
}

/* -- the public functions -- */

static smallm_status open_checked(smallm *model, span file, const smallm_open_options *options)
{
    smallm_open_options known = {sizeof known, 0};
    if (options != NULL) TRY_OWN(read_options(model, options, &known, sizeof known));
    int32_t threads = known.threads;
    if (threads < 0 || threads > MAX_THREADS)
        return out_of_range(model, "threads", threads, "1 to 1024, or 0 to choose by the size of the model");
    TRY_OWN(read_model(model, file));
    TRY_OWN(open_session(model, file, threads > 0 ? threads : default_threads(size_of(file) / (size_t)model->n_layer)));
    TRY_OWN(bind(model));
    model->open = true;
    return SMALLM_OK;
}

static smallm *new_handle(const char *name)
{
    smallm *model = calloc(1, sizeof *model);
    if (model != NULL) snprintf(model->name, sizeof model->name, "%s", name);
    return model;
}

smallm_status smallm_open_memory(const void *data, size_t bytes, const smallm_open_options *options, smallm **model)
{
    if (model == NULL) return SMALLM_MISTAKE;
    *model = new_handle("the model");
    if (*model == NULL) return SMALLM_NO_MEMORY;
    if (data == NULL) return fail(*model, SMALLM_MISTAKE, "data is NULL; pass the content of a model.onnx");
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

/* Reads a file or pipe to its end, into memory that the caller frees. */
static smallm_status read_file(smallm *model, const char *path, uint8_t **data, size_t *bytes)
{
    FILE *file = open_file(path);
    size_t room = 0, got = 1;
    if (file == NULL)
        return fail(model, SMALLM_BAD_MODEL, "cannot read %s; give the path of a model.onnx that export.py wrote",
                    model->name);
    smallm_status status = SMALLM_OK;
    while (status == SMALLM_OK && got > 0) {
        if (*bytes == room) {
            uint8_t *more = room >= MAX_FILE ? NULL : realloc(*data, room = room == 0 ? (size_t)1 << 20 : 2 * room);
            if (more == NULL) status = no_memory(model);
            else *data = more;
        }
        if (status == SMALLM_OK) *bytes += got = fread(*data + *bytes, 1, room - *bytes, file);
    }
    if (status == SMALLM_OK && ferror(file))
        status = fail(model, SMALLM_BAD_MODEL, "cannot read %s to its end; is it a file?", model->name);
    fclose(file);
    return status;
}

smallm_status smallm_open(const char *path, const smallm_open_options *options, smallm **model)
{
    if (model == NULL) return SMALLM_MISTAKE;
    *model = new_handle(path == NULL ? "" : path);
    if (*model == NULL) return SMALLM_NO_MEMORY;
    if (path == NULL) return fail(*model, SMALLM_MISTAKE, "path is NULL; give the path of a model.onnx");
    uint8_t *data = NULL;
    size_t bytes = 0;
    smallm_status status = read_file(*model, path, &data, &bytes);
    if (status == SMALLM_OK) status = open_checked(*model, span_of(data, bytes), options);
    free(data);
    return status;
}

void smallm_default_options(const smallm *model, smallm_options *options, size_t size)
{
    smallm_options all;
    memset(&all, 0, sizeof all);
    all.size = size;
    all.max_length = 500;
    all.temperature = model != NULL && model->open ? model->temperature : 0.8;
    all.top_k = model != NULL && model->open ? model->top_k : 0;
    all.top_p = model != NULL && model->open ? model->top_p : 1;
    all.min_p = model != NULL && model->open ? model->min_p : 0;
    all.repetition_penalty = 1;
    all.overflow = model != NULL && model->open && model->window > 0 ? SMALLM_SLIDE : SMALLM_SHIFT;
    if (options == NULL) return;
    memset(options, 0, size);
    memcpy(options, &all, size < sizeof all ? size : sizeof all);
}

/* The beginning of every call on a handle. */
static smallm_status begin(smallm *model)
{
    if (model == NULL) return SMALLM_MISTAKE;
    if (!model->open) return SMALLM_MISTAKE; /* the message of smallm_open is kept */
    model->error[0] = '\0';
    return SMALLM_OK;
}

smallm_status smallm_generate_start(smallm *model, const char *seed, size_t bytes, const smallm_options *options)
{
    TRY_OWN(begin(model));
    char *chunk = model->state.chunk; /* seed, stops and allowed may point into the chunk that smallm_next returned */
    model->state.chunk = NULL;
    end_sequence(&model->state);
    smallm_status status = start(model, seed, bytes, options);
    if (status != SMALLM_OK) end_sequence(&model->state);
    free(chunk);
    return status;
}

smallm_status smallm_next(smallm *model, const char **text, size_t *bytes)
{
    if (text != NULL) *text = "";
    if (bytes != NULL) *bytes = 0;
    TRY_OWN(begin(model));
    sequence_state *d = &model->state;
    if (text == NULL || bytes == NULL)
        return fail(model, SMALLM_MISTAKE, "text or bytes is NULL; pass pointers for the result");
    if (!d->begun)
        return fail(model, SMALLM_MISTAKE, "no text was started; call smallm_generate_start first");
    while (d->ready == 0) {
        if (d->done) return SMALLM_DONE;
        smallm_status status = advance(model);
        if (status != SMALLM_OK) {
            end_sequence(d);
            return status;
        }
    }
    memcpy(d->chunk, d->text, d->ready);
    d->chunk[d->ready] = '\0';
    memmove(d->text, d->text + d->ready, d->held);
    *text = d->chunk;
    *bytes = d->ready;
    d->ready = 0;
    return SMALLM_OK;
}

smallm_status smallm_score(
    smallm *model, const char *text, size_t bytes, double *nats, size_t capacity, size_t *count)
{
    if (count != NULL) *count = 0;
    TRY_OWN(begin(model));
    if (count == NULL) return fail(model, SMALLM_MISTAKE, "count is NULL; pass a pointer for the result");
    TRY_OWN(check_text(model, "text", text, bytes));
    for (size_t i = 0; i < bytes; i++) *count += !continues((uint8_t)text[i]);
    if (*count == 0) return SMALLM_OK;
    if (nats == NULL || capacity < *count)
        return fail(model, SMALLM_MISTAKE, "the text has %zu characters, but nats has room for %zu; pass a larger array",
                    *count, nats == NULL ? 0 : capacity);
    size_t T = (size_t)model->block_size;
    scorer r = {calloc(T + 1, sizeof *r.ids), calloc(T, sizeof *r.ones), 0, nats, 0};
    nats[0] = NAN;
    smallm_status status = r.ids && r.ones ? score(model, span_of(text, bytes), &r) : no_memory(model);
    free(r.ids);
    free(r.ones);
    return status;
}

size_t smallm_block_size(const smallm *model) { return model != NULL && model->open ? (size_t)model->block_size : 0; }

size_t smallm_vocab_size(const smallm *model) { return model != NULL && model->open ? (size_t)model->vocab_size : 0; }

const char *smallm_error(const smallm *model)
{
    return model != NULL ? model->error : "the handle is NULL: not enough memory, or NULL was passed";
}

static void close_session(smallm *model)
{
    const OrtApi *ort = model->ort;
    OrtValue *values[] = {model->no_past, model->ids_value, model->mask_value, model->keep_value, model->logits_value};
    if (ort == NULL) return;
    if (model->binding != NULL) ort->ReleaseIoBinding(model->binding);
    for (int i = 0; model->past != NULL && i < 2 * model->n_layer; i++)
        if (model->past[i] != NULL) ort->ReleaseValue(model->past[i]);
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        if (values[i] != NULL) ort->ReleaseValue(values[i]);
    if (model->memory != NULL) ort->ReleaseMemoryInfo(model->memory);
    if (model->session != NULL) ort->ReleaseSession(model->session);
    if (model->env != NULL) ort->ReleaseEnv(model->env);
}

void smallm_close(smallm *model)
{
    if (model == NULL) return;
    close_session(model);
    end_sequence(&model->state);
    void *memory[] = {model->tokens, model->sorted, model->start_text, model->past, model->past_names,
                      (void *)model->names, (void *)model->values, model->cache, model->rotation, model->mask,
                      model->ids, model->history, model->logits, model->processed, model->keys, model->order,
                      model->spare, model->weights};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free(model);
}

/* The part of the C library that smallm.c needs as WebAssembly, and the layout that smallm.js expects. */
#include "../c/smallm.h"

_Static_assert(sizeof(smallm_options) == 112 && offsetof(smallm_options, repetition_window) == 56 &&
               offsetof(smallm_options, stops) == 72 && offsetof(smallm_options, min_length) == 80 &&
               offsetof(smallm_options, banned) == 100, "smallm.js writes options at these offsets");
_Static_assert(sizeof(smallm_character) == 16 && offsetof(smallm_character, probability) == 8, "and reads characters");

/* -- memory: a list of free blocks by address, the first that fits -- */

typedef struct block {
    size_t size; /* with this header */
    struct block *next;
    uint64_t padding; /* blocks and the memory after their headers begin at multiples of 16 */
} block;

extern unsigned char __heap_base;
static block *free_blocks;
static size_t heap_end;

/* Puts a block into the list, joined to its neighbours. */
static void release(block *b)
{
    block **link = &free_blocks;
    while (*link != NULL && *link < b) {
        if ((char *)*link + (*link)->size == (char *)b) {
            (*link)->size += b->size;
            b = *link;
            break;
        }
        link = &(*link)->next;
    }
    if (*link != b) b->next = *link, *link = b;
    if (b->next != NULL && (char *)b + b->size == (char *)b->next) b->size += b->next->size, b->next = b->next->next;
}

/* Asks for more memory, at least this number of bytes. */
static int grow(size_t bytes)
{
    size_t start = heap_end, pages = (bytes >> 16) + 1;
    if (heap_end == 0) { /* what the module begins with */
        start = ((size_t)&__heap_base + 15) & ~(size_t)15;
        pages = 0;
    } else if (__builtin_wasm_memory_grow(0, pages) == (size_t)-1) {
        return 0;
    }
    heap_end = __builtin_wasm_memory_size(0) << 16;
    if (heap_end == 0) heap_end = (size_t)-1 & ~(size_t)15; /* 4 GiB */
    block *b = (block *)start;
    b->size = heap_end - start;
    release(b);
    return 1;
}

void *malloc(size_t bytes)
{
    if (bytes > (size_t)-1 / 2) return NULL;
    size_t size = (bytes + sizeof(block) + 15) & ~(size_t)15;
    do {
        for (block **link = &free_blocks; *link != NULL; link = &(*link)->next) {
            block *b = *link;
            if (b->size < size) continue;
            if (b->size - size > sizeof(block)) {
                block *rest = (block *)((char *)b + size);
                rest->size = b->size - size;
                rest->next = b->next;
                b->size = size;
                *link = rest;
            } else {
                *link = b->next;
            }
            return b + 1;
        }
    } while (grow(size));
    return NULL;
}

void free(void *memory)
{
    if (memory != NULL) release((block *)memory - 1);
}

void *calloc(size_t count, size_t size)
{
    size_t bytes;
    void *memory = __builtin_mul_overflow(count, size, &bytes) ? NULL : malloc(bytes);
    return memory != NULL ? memset(memory, 0, bytes) : NULL;
}

void *realloc(void *memory, size_t bytes)
{
    void *moved = malloc(bytes);
    if (moved == NULL || memory == NULL) return moved;
    size_t old = ((block *)memory - 1)->size - sizeof(block);
    memcpy(moved, memory, old < bytes ? old : bytes);
    free(memory);
    return moved;
}

/* memcpy, memmove and memset are instructions: see -mbulk-memory in build.sh. */
void *(memcpy)(void *restrict to, const void *restrict from, size_t bytes) { return __builtin_memcpy(to, from, bytes); }
void *(memmove)(void *to, const void *from, size_t bytes) { return __builtin_memmove(to, from, bytes); }
void *(memset)(void *memory, int byte, size_t bytes) { return __builtin_memset(memory, byte, bytes); }

int memcmp(const void *a, const void *b, size_t bytes)
{
    const unsigned char *x = a, *y = b;
    for (size_t i = 0; i < bytes; i++)
        if (x[i] != y[i]) return x[i] - y[i];
    return 0;
}

void *memchr(const void *memory, int byte, size_t bytes)
{
    const unsigned char *at = memory;
    for (; bytes > 0; at++, bytes--)
        if (*at == (unsigned char)byte) return (void *)at;
    return NULL;
}

size_t strlen(const char *text)
{
    const char *end = text;
    while (*end != '\0') end++;
    return (size_t)(end - text);
}

int strcmp(const char *a, const char *b)
{
    while (*a != '\0' && *a == *b) a++, b++;
    return (unsigned char)*a - (unsigned char)*b;
}

char *strchr(const char *text, int character) { return memchr(text, character, strlen(text) + 1); }

char *strstr(const char *text, const char *word)
{
    for (size_t left = strlen(text), bytes = strlen(word); left >= bytes; text++, left--)
        if (memcmp(text, word, bytes) == 0) return (char *)text;
    return NULL;
}

/* -- sorting and searching -- */

/* Shell's sort with Knuth's gaps. */
void qsort(void *items, size_t count, size_t size, int (*compare)(const void *, const void *))
{
    size_t gap = 1;
    while (gap < count / 3) gap = 3 * gap + 1;
    for (; gap > 0; gap /= 3)
        for (size_t i = gap; i < count; i++) {
            unsigned char *item = (unsigned char *)items + i * size, *before;
            for (; item - (unsigned char *)items >= (ptrdiff_t)(gap * size); item = before) {
                before = item - gap * size;
                if (compare(before, item) <= 0) break;
                for (size_t b = 0; b < size; b++) {
                    unsigned char kept = item[b];
                    item[b] = before[b];
                    before[b] = kept;
                }
            }
        }
}

void *bsearch(const void *key, const void *items, size_t count, size_t size, int (*compare)(const void *, const void *))
{
    size_t from = 0;
    while (from < count) {
        size_t middle = from + (count - from) / 2;
        const char *item = (const char *)items + middle * size;
        int order = compare(key, item);
        if (order == 0) return (void *)item;
        if (order < 0) count = middle;
        else from = middle + 1;
    }
    return NULL;
}

/* -- messages -- */

typedef struct {
    char *at, *end;
    int length;
} output;

static void put(output *o, const char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++, o->length++)
        if (o->at < o->end) *o->at++ = text[i];
}

static void put_number(output *o, uint64_t number)
{
    char digits[20];
    size_t at = sizeof digits;
    do digits[--at] = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    put(o, digits + at, sizeof digits - at);
}

static void put_signed(output *o, int64_t number)
{
    if (number < 0) put(o, "-", 1);
    put_number(o, number < 0 ? 0 - (uint64_t)number : (uint64_t)number);
}

/* %s, %.*s, %.20s, %d, %lld, %zu, and %.17g, whose digits after the point are left out: smallm.js checks numbers itself. */
int vsnprintf(char *text, size_t room, const char *format, va_list arguments)
{
    output o = {text, text + (room > 0 ? room - 1 : 0), 0};
    for (; *format != '\0'; format++) {
        if (*format != '%') {
            put(&o, format, 1);
            continue;
        }
        int most = -1;
        if (*++format == '.')
            for (most = 0, format++; *format == '*' || (*format >= '0' && *format <= '9'); format++)
                most = *format == '*' ? va_arg(arguments, int) : 10 * most + *format - '0';
        if (*format == 's') {
            const char *word = va_arg(arguments, const char *);
            size_t bytes = 0;
            while ((most < 0 || bytes < (size_t)most) && word[bytes] != '\0') bytes++;
            put(&o, word, bytes);
        } else if (*format == 'g') {
            put_signed(&o, (int64_t)va_arg(arguments, double));
        } else if (*format == 'z') {
            format++;
            put_number(&o, va_arg(arguments, size_t));
        } else if (*format == 'l') {
            format += 2;
            put_signed(&o, va_arg(arguments, long long));
        } else {
            put_signed(&o, va_arg(arguments, int));
        }
    }
    if (room > 0) *o.at = '\0';
    return o.length;
}

int snprintf(char *text, size_t room, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, room, format, arguments);
    va_end(arguments);
    return length;
}

/* The declarations of the C library that smallm.c needs as WebAssembly; build.sh includes it in place of the headers. */
#include <stdarg.h>
#include <stddef.h>

#define NAN __builtin_nanf("")
#define INFINITY __builtin_inff()
#define isnan(x) __builtin_isnan(x)
#define isfinite(x) __builtin_isfinite(x)
#define sqrtf(x) __builtin_sqrtf(x)

void *malloc(size_t bytes), *calloc(size_t count, size_t size), *realloc(void *memory, size_t bytes);
void free(void *memory);
void *memcpy(void *restrict to, const void *restrict from, size_t bytes), *memmove(void *to, const void *from, size_t bytes);
void *memset(void *memory, int byte, size_t bytes), *memchr(const void *memory, int byte, size_t bytes);
int memcmp(const void *a, const void *b, size_t bytes), strcmp(const char *a, const char *b);
size_t strlen(const char *text);
char *strchr(const char *text, int character), *strstr(const char *text, const char *word);
int vsnprintf(char *text, size_t room, const char *format, va_list arguments);
int snprintf(char *text, size_t room, const char *format, ...);
void qsort(void *items, size_t count, size_t size, int (*compare)(const void *, const void *));
void *bsearch(const void *key, const void *items, size_t count, size_t size, int (*compare)(const void *, const void *));

/* There are no files: smallm_open finds none. */
typedef struct FILE FILE;
#define fopen(path, mode) ((void)(path), (FILE *)NULL)
#define fread(to, size, count, file) ((size_t)0)
#define fseek(file, offset, origin) ((void)(file), -1)
#define ftell(file) 0L
#define ferror(file) 0
#define fclose(file) ((void)(file))

/* Vectors, memory and threads of the kernels. */

/* ---- Vectors ---- */

#ifdef __AVX512F__
#include <immintrin.h>
enum { W = 16, ROWS = 8 }; /* W: floats per register; ROWS: rows per tile, whose 2 * ROWS sums fill the registers */
#else
enum { W = 8, ROWS = 6 };
#endif
enum { PANEL = 2 * W }; /* columns per tile */

typedef float vec __attribute__((vector_size(W * sizeof(float))));
typedef float vec_anywhere __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(W * sizeof(float))));
typedef uint32_t uvec __attribute__((vector_size(W * sizeof(float))));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec8_anywhere __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16)));

INLINE vec load(const float *p) { return *(const vec_anywhere *)p; }
INLINE void store(float *p, vec x) { *(vec_anywhere *)p = x; }
INLINE vec8 load8(const float *p) { return *(const vec8_anywhere *)p; }
INLINE void store8(float *p, vec8 x) { *(vec8_anywhere *)p = x; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

INLINE float sum(vec x)
{
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    union { vec v; vec4 quarters[W / 4]; } u = {x};
    vec4 q = u.quarters[0] + u.quarters[1];
    return (q[0] + q[1]) + (q[2] + q[3]);
#endif
}

INLINE float max_of(vec x)
{
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float a = x[0] > x[4] ? x[0] : x[4], b = x[1] > x[5] ? x[1] : x[5];
    float c = x[2] > x[6] ? x[2] : x[6], d = x[3] > x[7] ? x[3] : x[7];
    a = a > b ? a : b;
    c = c > d ? c : d;
    return a > c ? a : c;
#endif
}

/* The larger of each pair of elements; b where one of the two is NaN. */
INLINE vec larger(vec a, vec b)
{
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

/* e^x with an error of at most 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Returns 0 for
 * -infinity and NaN for NaN. */
INLINE vec exponential(vec x)
{
#ifdef __AVX512F__
    x = larger(all(-110.0f), x);
    vec n = (vec)_mm512_roundscale_ps((__m512)(x * all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
#else
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding this rounds to an integer, which stands in the low bits */
    ivec tiny = x < all(-87.0f);
    x = choose(x > all(88.0f), all(88.0f), x);
    vec shifted = x * all(1.44269504f) + magic;
    vec n = shifted - magic;
#endif
    vec r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    vec p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vec power = (vec)((((ivec)shifted - (ivec)magic) << 23) + (ivec)all(1.0f));
    return choose(tiny, all(0.0f), p * power);
#endif
}

/* SHUFFLE(a, b, i...): the elements of a and b, one after another, with these indices. */
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#ifdef __AVX512F__
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#endif

/* x (W, n) -> y (n, W) for n <= W, with rows ldx and ldy apart. A whole square takes log2 W rounds, each of which
 * interleaves the first half of the rows with the second half. */
INLINE void transpose(const float *x, int64_t ldx, int64_t n, float *y, int64_t ldy)
{
    if (n < W) {
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < W; j++) y[i * ldy + j] = x[j * ldx + i];
        return;
    }
    vec rows[W], mixed[W];
    _Pragma("GCC unroll 16") for (int i = 0; i < W; i++) rows[i] = load(x + i * ldx);
    _Pragma("GCC unroll 4") for (int round = 1; round < W; round *= 2)
    {
        _Pragma("GCC unroll 8") for (int i = 0; i < W / 2; i++)
        {
            mixed[2 * i] = SHUFFLE(rows[i], rows[i + W / 2], LOW_HALVES);
            mixed[2 * i + 1] = SHUFFLE(rows[i], rows[i + W / 2], HIGH_HALVES);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < W; i++) rows[i] = mixed[i];
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < W; i++) store(y + i * ldy, rows[i]);
}

/* ---- Memory and threads ---- */

typedef struct {
    void *start;
    size_t bytes;
} Memory;

/* Start of the memory, reallocated if it is shorter than `bytes`; the content is then lost. */
static void *reserve(Memory *memory, size_t bytes)
{
    if (memory->bytes < bytes) {
        free(memory->start);
        memory->bytes = 0;
        if (posix_memalign(&memory->start, 64, bytes)) abort();
        memory->bytes = bytes;
    }
    return memory->start;
}

/* Scratch memory of the calling thread, reused by its next call. */
static float *scratch(size_t floats)
{
    static _Thread_local Memory memory;
    return reserve(&memory, floats * sizeof(float));
}

/* This thread's part [*from, *to) of `count` items. */
INLINE void thread_range(int64_t count, int64_t *from, int64_t *to)
{
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    *from = count * me / threads;
    *to = count * (me + 1) / threads;
}

/* Number of slots for sums over rows: two per thread, which balance threads of unequal speed; one for one thread. */
INLINE int64_t slots_of(int threads) { return threads == 1 ? 1 : 2 * threads; }

/* The part [*from, *to) of `count` items that belongs to `slot`. */
INLINE void slot_range(int64_t slot, int64_t slots, int64_t count, int64_t *from, int64_t *to)
{
    *from = count * slot / slots;
    *to = count * (slot + 1) / slots;
}

/* Sums parts (slots, n) over the slots into total (n). All threads call this after a barrier. With one slot, `parts` is
 * `total`. */
static void sum_slots(const float *parts, int64_t n, int64_t slots, float *total)
{
    int64_t from, to;
    if (parts == total) return;
    thread_range(n / W, &from, &to);
    for (int64_t i = from * W; i < to * W; i += W) {
        vec x = load(parts + i);
        for (int64_t s = 1; s < slots; s++) x += load(parts + s * n + i);
        store(total + i, x);
    }
}


/* CPU kernels of a training step: a whole Transformer block, forward and backward, RMSNorm, cross-entropy and Muon's
 * orthogonalisation.
 *
 * compiler.py compiles this file with the machine's C compiler. The file uses the vector extensions of GCC and Clang, and
 * OpenMP. operations.py implements every operation in plain PyTorch as well; the tests compare the two.
 *
 * The matrices of a small model are so small that one library call per product and one pass over memory per norm cost
 * more than the arithmetic. A block is therefore one call: each thread takes chunks of rows through all operations, a
 * chunk and the weights stay in the cache, and the backward pass recomputes what is cheaper to compute than to store.
 *
 * Compiled with -DBF16, the products with weights and the products that compute weight gradients round their operands to
 * bf16 and sum in float32. All other operations, attention included, stay in float32.
 *
 * All tensors are float32 (targets int64), contiguous, row-major. Chunks are scheduled dynamically, because other
 * programs may slow some cores. Sums over chunks are accumulated in `slots`, two per thread, each with a fixed range of
 * rows. Results therefore depend on the number of threads (the order of summation), but not on the scheduling.
 *
 * Shapes: N = B T rows (batch, time), C channels, H query heads, G key/value heads, D head width, R = (H + 2 G) D rows of
 * the packed projection, I inner width of the feed-forward, V vocabulary.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Declared here, because macOS comes without omp.h. */
int omp_get_num_threads(void);
int omp_get_thread_num(void);

#define INLINE static inline __attribute__((always_inline))

/* ---- Vectors ---- */

#ifdef __AVX512F__
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
typedef int32_t ivec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

INLINE vec load(const float *p) { return *(const vec_anywhere *)p; }
INLINE void store(float *p, vec x) { *(vec_anywhere *)p = x; }
INLINE vec8 load8(const float *p) { return *(const vec8_anywhere *)p; }
INLINE void store8(float *p, vec8 x) { *(vec8_anywhere *)p = x; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

INLINE float sum(vec x)
{
    union { vec v; vec8 halves[W / 8]; vec4 quarters[W / 4]; } u = {x};
    if (W == 16) u.halves[0] += u.halves[W / 8 - 1];
    vec4 q = u.quarters[0] + u.quarters[1];
    return (q[0] + q[1]) + (q[2] + q[3]);
}

INLINE float max_of(vec x)
{
    union { vec v; vec8 halves[W / 8]; } u = {x};
    if (W == 16) {
        ivec8 over = u.halves[W / 8 - 1] > u.halves[0];
        u.halves[0] = (vec8)((over & (ivec8)u.halves[W / 8 - 1]) | (~over & (ivec8)u.halves[0]));
    }
    vec8 h = u.halves[0];
    float a = h[0] > h[4] ? h[0] : h[4], b = h[1] > h[5] ? h[1] : h[5];
    float c = h[2] > h[6] ? h[2] : h[6], d = h[3] > h[7] ? h[3] : h[7];
    a = a > b ? a : b;
    c = c > d ? c : d;
    return a > c ? a : c;
}

/* e^x with an error of at most 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Returns 0
 * below -87 and NaN for NaN. */
INLINE vec exponential(vec x)
{
    const vec magic = all(12582912.0f); /* 1.5 * 2^23: adding this rounds to an integer, which stands in the low bits */
    ivec tiny = x < all(-87.0f);
    x = choose(x > all(88.0f), all(88.0f), x);
    vec shifted = x * all(1.44269504f) + magic;
    vec n = shifted - magic;
    vec r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    vec p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * r * r + r + all(1.0f);
    vec power = (vec)((((ivec)shifted - (ivec)magic) << 23) + (ivec)all(1.0f));
    return choose(tiny, all(0.0f), p * power);
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

#ifdef BF16
/* Like `scratch`, for pairs of bf16 values. */
static uint32_t *pair_memory(size_t pairs)
{
    static _Thread_local Memory memory;
    return reserve(&memory, pairs * sizeof(uint32_t));
}
#endif

/* This thread's part [*from, *to) of `count` items. */
INLINE void thread_range(int64_t count, int64_t *from, int64_t *to)
{
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    *from = count * me / threads;
    *to = count * (me + 1) / threads;
}

/* The part [*from, *to) of `count` items that belongs to `slot`. */
INLINE void slot_range(int64_t slot, int64_t slots, int64_t count, int64_t *from, int64_t *to)
{
    *from = count * slot / slots;
    *to = count * (slot + 1) / slots;
}

/* Sums parts (slots, n) over the slots into total (n). All threads call this after a barrier. */
static void sum_slots(const float *parts, int64_t n, int64_t slots, float *total)
{
    int64_t from, to;
    thread_range(n / W, &from, &to);
    for (int64_t i = from * W; i < to * W; i += W) {
        vec x = load(parts + i);
        for (int64_t s = 1; s < slots; s++) x += load(parts + s * n + i);
        store(total + i, x);
    }
}

/* ---- Matrix products of operands that fit in the cache ---- */

/* c (rows, PANEL) = a (rows, K) b (K, PANEL), or += if `add`; element (r, k) of a is a[r * ar + k * ak]. */
#define TILE(rows)                                                                                                     \
    INLINE void tile_##rows(const float *a, int64_t ar, int64_t ak, const float *b, int64_t ldb, int64_t K, float *c, \
                            int64_t ldc, int add)                                                                     \
    {                                                                                                                  \
        vec left[rows], right[rows];                                                                                   \
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) left[r] = right[r] = (vec){0};                         \
        for (int64_t k = 0; k < K; k++) {                                                                              \
            vec b0 = load(b + k * ldb), b1 = load(b + k * ldb + W);                                                    \
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)                                                    \
            {                                                                                                          \
                vec x = all(a[r * ar + k * ak]);                                                                       \
                left[r] += x * b0;                                                                                     \
                right[r] += x * b1;                                                                                    \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)                                                        \
        {                                                                                                              \
            float *p = c + r * ldc;                                                                                    \
            store(p, add ? load(p) + left[r] : left[r]);                                                               \
            store(p + W, add ? load(p + W) + right[r] : right[r]);                                                     \
        }                                                                                                              \
    }
TILE(1)
#ifdef __AVX512F__
TILE(8)
#define TILE_OF_ROWS tile_8
#else
TILE(6)
#define TILE_OF_ROWS tile_6
#endif

/* c (M, N) = a (M, K) b (K, N), or += if `add`. Columns n .. n + PANEL - 1 of b start at b + n * step, its rows are ldb
 * apart. N is a multiple of PANEL, or c and b are padded to one. */
static void product(int64_t M, int64_t N, int64_t K, const float *a, int64_t ar, int64_t ak, const float *b, int64_t step,
                    int64_t ldb, float *c, int64_t ldc, int add)
{
    for (int64_t n = 0; n < N; n += PANEL) {
        int64_t m = 0;
        for (; m + ROWS <= M; m += ROWS) TILE_OF_ROWS(a + m * ar, ar, ak, b + n * step, ldb, K, c + m * ldc + n, ldc, add);
        for (; m < M; m++) tile_1(a + m * ar, ar, ak, b + n * step, ldb, K, c + m * ldc + n, ldc, add);
    }
}

/* `product` where b is an ordinary matrix with rows ldb apart. */
static void multiply(int64_t M, int64_t N, int64_t K, const float *a, int64_t ar, int64_t ak, const float *b, int64_t ldb,
                     float *c, int64_t ldc, int add)
{
    product(M, N, K, a, ar, ak, b, 1, ldb, c, ldc, add);
}

/* `product` where b (K, N) is packed: panels of PANEL columns one after another, each contiguous. */
static void multiply_packed(int64_t M, int64_t N, int64_t K, const float *a, int64_t lda, const float *b, float *c,
                            int64_t ldc, int add)
{
    product(M, N, K, a, lda, 1, b, K, PANEL, c, ldc, add);
}

#ifdef BF16
/* ---- Matrix products of operands rounded to bf16, in pairs along K; products and sums are float32 ---- */

#ifdef __AVX512BF16__
#include <immintrin.h>
/* sums + product of the low halves + product of the high halves. */
INLINE vec dot(vec sums, uvec a, uvec b) { return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b); }
#else /* for tests on processors without these instructions; about as fast as float32 */
INLINE vec dot(vec sums, uvec a, uvec b)
{
    return sums + (vec)(a << 16) * (vec)(b << 16) + (vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u);
}
#endif

/* Bits of x rounded to bf16, to nearest, ties to even; NaN stays NaN. */
INLINE uvec rounded(vec x)
{
    uvec bits = (uvec)x;
    uvec even = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return (uvec)choose(x != x, (vec)((uvec){0} + 0x7fc0u), (vec)even);
}

/* Rows k and k + 1 of b (K, n), interleaved: (ceil(K / 2), n) pairs. For odd K the last row is paired with zeros. */
static void pairs_of_rows(const float *b, int64_t ldb, int64_t K, int64_t n, uint32_t *pairs)
{
    for (int64_t k = 0; k < K; k += 2, pairs += n)
        for (int64_t i = 0; i < n; i += W) {
            uvec high = k + 1 < K ? rounded(load(b + (k + 1) * ldb + i)) << 16 : (uvec){0};
            store((float *)pairs + i, (vec)(rounded(load(b + k * ldb + i)) | high));
        }
}

/* Pairs of neighbours in each row of a (M, K), K even: (M, K / 2). */
static void pairs_in_rows(const float *a, int64_t lda, int64_t M, int64_t K, uint32_t *pairs)
{
    for (int64_t m = 0; m < M; m++, pairs += K / 2)
        for (int64_t k = 0; k < K; k += W) {
            uvec x = rounded(load(a + m * lda + k));
            for (int64_t i = 0; i < W; i += 2) pairs[(k + i) / 2] = x[i] | x[i + 1] << 16;
        }
}

#define HALF_TILE(rows)                                                                                                \
    INLINE void half_tile_##rows(const uint32_t *a, int64_t ar, int64_t ak, const uint32_t *b, int64_t K, float *c,    \
                                 int64_t ldc, int add)                                                                 \
    {                                                                                                                  \
        vec left[rows], right[rows];                                                                                   \
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) left[r] = right[r] = (vec){0};                         \
        for (int64_t k = 0; k < K; k++) {                                                                              \
            uvec b0 = (uvec)load((const float *)b + k * PANEL), b1 = (uvec)load((const float *)b + k * PANEL + W);     \
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)                                                    \
            {                                                                                                          \
                uvec x = (uvec){0} + a[r * ar + k * ak];                                                               \
                left[r] = dot(left[r], x, b0);                                                                         \
                right[r] = dot(right[r], x, b1);                                                                       \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)                                                        \
        {                                                                                                              \
            float *p = c + r * ldc;                                                                                    \
            store(p, add ? load(p) + left[r] : left[r]);                                                               \
            store(p + W, add ? load(p + W) + right[r] : right[r]);                                                     \
        }                                                                                                              \
    }
HALF_TILE(1)
HALF_TILE(8)

/* Like `product`, where the rows or the columns of a are contiguous (ak or ar is 1); for columns, M is a multiple of W. */
static void half_product(int64_t M, int64_t N, int64_t K, const float *a, int64_t ar, int64_t ak, const float *b,
                         int64_t step, int64_t ldb, float *c, int64_t ldc, int add)
{
    int64_t half = (K + 1) / 2, r = ak == 1 ? half : 1, k = ak == 1 ? 1 : M;
    uint32_t *left = pair_memory((size_t)(half * (M + PANEL))), *right = left + half * M;
    if (ak == 1) pairs_in_rows(a, ar, M, K, left);
    else pairs_of_rows(a, ak, K, M, left);
    for (int64_t n = 0; n < N; n += PANEL) {
        int64_t m = 0;
        pairs_of_rows(b + n * step, ldb, K, PANEL, right);
        for (; m + 8 <= M; m += 8) half_tile_8(left + m * r, r, k, right, half, c + m * ldc + n, ldc, add);
        for (; m < M; m++) half_tile_1(left + m * r, r, k, right, half, c + m * ldc + n, ldc, add);
    }
}
#endif

/* Activations times a weight: c (M, N) = a (M, K) b (K, N), b packed. */
static void apply(int64_t M, int64_t N, int64_t K, const float *a, const float *b, float *c)
{
#ifdef BF16
    half_product(M, N, K, a, K, 1, b, K, PANEL, c, N, 0);
#else
    multiply_packed(M, N, K, a, K, b, c, N, 0);
#endif
}

/* Gradient of a weight: c (M, N) += a' b with a (K, M), b (K, N). */
static void multiply_outer(int64_t M, int64_t N, int64_t K, const float *a, const float *b, float *c)
{
#ifdef BF16
    half_product(M, N, K, a, 1, M, b, 1, N, c, N, 1);
#else
    if (N > M) {
        multiply(M, N, K, a, 1, M, b, N, c, N, 1);
        return;
    }
    int64_t m = 0; /* the few rows of b stay in the cache */
    for (; m + ROWS <= M; m += ROWS)
        for (int64_t n = 0; n < N; n += PANEL) TILE_OF_ROWS(a + m, 1, M, b + n, N, K, c + m * N + n, N, 1);
    for (; m < M; m++)
        for (int64_t n = 0; n < N; n += PANEL) tile_1(a + m, 1, M, b + n, N, K, c + m * N + n, N, 1);
#endif
}

/* Packs the panels [from, to) of b (K, N). */
static void pack(const float *b, int64_t K, int64_t N, float *packed, int64_t from, int64_t to)
{
    for (int64_t n = from * PANEL; n < to * PANEL; n += PANEL)
        for (int64_t k = 0; k < K; k++) memcpy(packed + n * K + k * PANEL, b + k * N + n, PANEL * sizeof(float));
}

/* Packs the panels [from, to) of the transpose of w (N, K). */
static void pack_transposed(const float *w, int64_t K, float *packed, int64_t from, int64_t to)
{
    for (int64_t n = from * PANEL; n < to * PANEL; n += PANEL)
        for (int64_t k = 0; k < K; k += W)
            for (int64_t j = 0; j < PANEL; j++)
                for (int64_t i = 0; i < W; i++) packed[n * K + (k + i) * PANEL + j] = w[(n + j) * K + k + i];
}

/* ---- RMSNorm: y = x / rms(x) * gain ---- */

INLINE float inverse_rms(const float *x, int64_t C, float eps)
{
    vec squares = {0};
    for (int64_t c = 0; c < C; c += W) squares += load(x + c) * load(x + c);
    return 1.0f / sqrtf(sum(squares) / (float)C + eps);
}

INLINE void norm(const float *x, const float *gain, float *y, int64_t C, float eps)
{
    vec s = all(inverse_rms(x, C, eps));
    for (int64_t c = 0; c < C; c += W) store(y + c, load(x + c) * s * load(gain + c));
}

/* dx (C) = base + gradient of x; adds the gradient of the gain to dgain (C). base may be NULL. */
INLINE void norm_backward(const float *dy, const float *x, const float *gain, const float *base, float *dx, float *dgain,
                          int64_t C, float eps)
{
    vec s = all(inverse_rms(x, C, eps)), dot = {0};
    for (int64_t c = 0; c < C; c += W) {
        vec along = load(dy + c) * load(x + c);
        store(dgain + c, load(dgain + c) + along * s);
        dot += along * load(gain + c);
    }
    vec part = s * s * all(sum(dot) / (float)C);
    for (int64_t c = 0; c < C; c += W) {
        vec d = s * (load(dy + c) * load(gain + c) - load(x + c) * part);
        store(dx + c, base ? load(base + c) + d : d);
    }
}

/* x (N, C), gain (C) -> y (N, C). */
void rms_norm(const float *x, const float *gain, float *y, int64_t N, int64_t C, float eps, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to;
        thread_range(N, &from, &to);
        for (int64_t n = from; n < to; n++) norm(x + n * C, gain, y + n * C, C, eps);
    }
}

/* dy, x (N, C) -> dx (N, C), dgain (C). Workspace: parts (2 threads, C). */
void rms_norm_backward(const float *dy, const float *x, const float *gain, float *dx, float *dgain, float *parts,
                       int64_t N, int64_t C, float eps, int threads)
{
    const int64_t slots = 2 * threads;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t slot = 0; slot < slots; slot++) {
            int64_t from, to;
            float *part = memset(parts + slot * C, 0, (size_t)C * sizeof(float));
            slot_range(slot, slots, N, &from, &to);
            for (int64_t n = from; n < to; n++)
                norm_backward(dy + n * C, x + n * C, gain, NULL, dx + n * C, part, C, eps);
        }
        sum_slots(parts, C, slots, dgain);
    }
}

/* ---- Cross-entropy ---- */

/* logits (N, V), targets (N), -1 = ignored -> nats (N), lse (N) = log-sum-exp of each row. */
void cross_entropy(const float *logits, const int64_t *targets, float *nats, float *lse, int64_t N, int64_t V,
                   int threads)
{
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to, whole = V / W * W;
        thread_range(N, &from, &to);
        for (int64_t n = from; n < to; n++) {
            const float *row = logits + n * V;
            float top = row[0], total = 0;
            if (whole) {
                vec m = load(row);
                for (int64_t v = W; v < whole; v += W) m = choose(load(row + v) > m, load(row + v), m);
                top = max_of(m);
            }
            for (int64_t v = whole; v < V; v++) top = row[v] > top ? row[v] : top;
            vec t = {0};
            for (int64_t v = 0; v < whole; v += W) t += exponential(load(row + v) - all(top));
            total = sum(t);
            for (int64_t v = whole; v < V; v++) total += expf(row[v] - top);
            lse[n] = top + logf(total);
            nats[n] = targets[n] < 0 ? 0.0f : lse[n] - row[targets[n]];
        }
    }
}

/* dnats (N) -> dlogits (N, V). */
void cross_entropy_backward(const float *dnats, const float *logits, const int64_t *targets, const float *lse,
                            float *dlogits, int64_t N, int64_t V, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to, whole = V / W * W;
        thread_range(N, &from, &to);
        for (int64_t n = from; n < to; n++) {
            const float *row = logits + n * V;
            float *out = dlogits + n * V, d = targets[n] < 0 ? 0.0f : dnats[n];
            for (int64_t v = 0; v < whole; v += W) store(out + v, all(d) * exponential(load(row + v) - all(lse[n])));
            for (int64_t v = whole; v < V; v++) out[v] = d * expf(row[v] - lse[n]);
            if (targets[n] >= 0) out[targets[n]] -= d;
        }
    }
}

/* ---- Muon's orthogonalisation ---- */

/* c (n, n) = a (n, K) b (K, n) with b packed, for a symmetric c: computes the lower half and mirrors it. */
static void multiply_symmetric(int64_t n, int64_t K, const float *a, const float *b, float *c)
{
    for (int64_t j = 0; j < n; j += PANEL) {
        multiply_packed(n - j, PANEL, K, a + j * K, K, b + j * K, c + j * n + j, n, 0);
        for (int64_t i = j + PANEL; i < n; i++)
            for (int64_t k = j; k < j + PANEL; k++) c[k * n + i] = c[i * n + k];
    }
}

/* For each (a, b, c) of the coefficients (steps, 3): x = a x + (b S + c S S) x with S = x x', in place. x holds n matrices
 * (rows, columns) of norm about 1 with rows <= columns, both multiples of PANEL. */
void orthogonalise(float *x, const float *coefficients, int64_t n, int64_t rows, int64_t columns, int64_t steps,
                   int threads)
{
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t m = 0; m < n; m++) {
        float *packed = scratch((size_t)(rows * columns + 2 * rows * rows)), *gram = packed + rows * columns;
        float *polynomial = gram + rows * rows, *z = x + m * rows * columns;
        for (int64_t s = 0; s < steps; s++) {
            const float *abc = coefficients + 3 * s;
            pack_transposed(z, columns, packed, 0, rows / PANEL);
            multiply_symmetric(rows, columns, z, packed, gram);
            pack(gram, rows, rows, packed, 0, rows / PANEL);
            multiply_symmetric(rows, rows, gram, packed, polynomial);
            for (int64_t i = 0; i < rows * rows; i += W)
                store(polynomial + i, all(abc[1]) * load(gram + i) + all(abc[2]) * load(polynomial + i));
            pack(z, rows, columns, packed, 0, columns / PANEL);
            for (int64_t i = 0; i < rows * columns; i += W) store(z + i, all(abc[0]) * load(z + i));
            multiply_packed(rows, columns, rows, polynomial, rows, packed, z, columns, 1);
        }
    }
}

/* ---- Causal self-attention over the last `window` positions; queries and keys are normed, then rotated ---- */

typedef struct {
    const float *qkv, *q_gain, *k_gain, *cos, *sin; /* (B, T, H + 2 G, D), (D), (D), (T, D), first half of sin negated */
    float *y, *lse;                                 /* (B, T, H, D), (B, H, T): log-sum-exp of the scores */
    const float *dy;                                /* (B, T, H, D) */
    float *dqkv;                                    /* (B, T, H + 2 G, D) */
    int64_t B, T, H, G, window;
    float eps;
} Attention;

enum { QUERIES = 32 }; /* queries processed together */

INLINE int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

/* First key to compute for queries from `first` on: the start of the window, rounded down to a multiple of PANEL. */
INLINE int64_t first_key(const Attention *s, int64_t first)
{
    return first < s->window ? 0 : (first - s->window + 1) / PANEL * PANEL;
}

/* One head at position t: x (D) -> y (D) = rotate(x / rms(x) * gain) * factor. */
INLINE void norm_rotate(const Attention *s, const int64_t D, const float *x, const float *gain, int64_t t, float factor,
                        float *y)
{
    const int64_t half = D / 2;
    const float *cos = s->cos + t * D, *sin = s->sin + t * D;
    float f = inverse_rms(x, D, s->eps) * factor;
    for (int64_t d = 0; d < half; d += 8) {
        vec8 low = load8(x + d) * load8(gain + d) * f, high = load8(x + d + half) * load8(gain + d + half) * f;
        store8(y + d, low * load8(cos + d) + high * load8(sin + d));
        store8(y + d + half, high * load8(cos + d + half) + low * load8(sin + d + half));
    }
}

/* Backward of `norm_rotate`: overwrites dy (D), writes dx (D), adds to dgain (D). */
INLINE void norm_rotate_backward(const Attention *s, const int64_t D, const float *x, const float *gain, int64_t t,
                                 float factor, float *dy, float *dx, float *dgain)
{
    const int64_t half = D / 2;
    const float *cos = s->cos + t * D, *sin = s->sin + t * D;
    for (int64_t d = 0; d < half; d += 8) {
        vec8 low = load8(dy + d) * factor, high = load8(dy + d + half) * factor;
        store8(dy + d, low * load8(cos + d) + high * load8(sin + d + half));
        store8(dy + d + half, high * load8(cos + d + half) + low * load8(sin + d));
    }
    norm_backward(dy, x, gain, NULL, dx, dgain, D, s->eps);
}

/* x (T, D) with rows ld apart -> y (D, T) with rows ldy apart. */
INLINE void transpose(const float *x, int64_t ld, int64_t T, int64_t D, float *y, int64_t ldy)
{
    for (int64_t t = 0; t < T; t++)
        for (int64_t d = 0; d < D; d++) y[d * ldy + t] = x[t * ld + d];
}

/* scores (n, ld) of queries first .. first + n - 1 -> e^(score - shift of the row), and 0 for keys after the query or
 * before its window. If `shift` is NULL, the shift is the maximum of the row. totals (n, 2), if not NULL, receives shift
 * and sum of each row. */
static void exponentials(float *scores, int64_t ld, int64_t n, int64_t first, int64_t columns, int64_t window,
                         const float *shift, float *totals)
{
    for (int64_t i = 0; i < n; i++) {
        float *row = scores + i * ld;
        for (int64_t j = 0; j <= first + i - window; j++) row[j] = -INFINITY;
        for (int64_t j = first + i + 1; j < columns; j++) row[j] = -INFINITY;
        vec top = load(row), total = {0};
        if (!shift)
            for (int64_t j = W; j < columns; j += W) top = choose(load(row + j) > top, load(row + j), top);
        float by = shift ? shift[i] : max_of(top);
        for (int64_t j = 0; j < columns; j += W) {
            vec e = exponential(load(row + j) - all(by));
            store(row + j, e);
            total += e;
        }
        if (totals) {
            totals[2 * i] = by;
            totals[2 * i + 1] = sum(total);
        }
    }
}

/* Task (b, g): the query heads of sequence b that share the key/value head g. Callers pass the common D as a constant,
 * so that the compiler specialises the function. */
INLINE void attend(const Attention *s, int64_t task, const int64_t D)
{
    const int64_t T = s->T, H = s->H, G = s->G, b = task / G, g = task % G;
    const int64_t row = (H + 2 * G) * D, group = H / G, P = padded(T), E = padded(D);
    const float factor = 1.0f / sqrtf((float)D), *x = s->qkv + b * T * row;
    float *kt = scratch((size_t)(D * P + T * E + QUERIES * (D + P + E + 2) + D)), *v = kt + D * P, *q = v + T * E;
    float *p = q + QUERIES * D, *o = p + QUERIES * P, *totals = o + QUERIES * E, *one = totals + 2 * QUERIES;

    for (int64_t t = 0; t < T; t++) {
        norm_rotate(s, D, x + t * row + (H + g) * D, s->k_gain, t, 1.0f, one);
        for (int64_t d = 0; d < D; d++) kt[d * P + t] = one[d];
        for (int64_t d = 0; d < D; d++) v[t * E + d] = x[t * row + (H + G + g) * D + d];
    }
    for (int64_t h = g * group; h < (g + 1) * group; h++)
        for (int64_t first = 0; first < T; first += QUERIES) {
            int64_t n = T - first < QUERIES ? T - first : QUERIES, low = first_key(s, first);
            int64_t keys = first + n - low, columns = padded(keys);
            for (int64_t i = 0; i < n; i++)
                norm_rotate(s, D, x + (first + i) * row + h * D, s->q_gain, first + i, factor, q + i * D);
            multiply(n, columns, D, q, D, 1, kt + low, P, p, P, 0);
            exponentials(p, P, n, first - low, columns, s->window, NULL, totals);
            multiply(n, E, keys, p, P, 1, v + low * E, E, o, E, 0);
            for (int64_t i = 0; i < n; i++) {
                float *out = s->y + ((b * T + first + i) * H + h) * D, inverse = 1.0f / totals[2 * i + 1];
                for (int64_t d = 0; d < D; d++) out[d] = o[i * E + d] * inverse;
                s->lse[(b * H + h) * T + first + i] = totals[2 * i] + logf(totals[2 * i + 1]);
            }
        }
}

INLINE void attend_backward(const Attention *s, int64_t task, const int64_t D, float *dq_gain, float *dk_gain)
{
    const int64_t T = s->T, H = s->H, G = s->G, b = task / G, g = task % G;
    const int64_t row = (H + 2 * G) * D, group = H / G, P = padded(T), E = padded(D);
    const float factor = 1.0f / sqrtf((float)D), *x = s->qkv + b * T * row;
    float *dx = s->dqkv + b * T * row;
    float *kt = scratch((size_t)(2 * D * P + 3 * T * E + QUERIES * (2 * P + 3 * E))), *vt = kt + D * P, *k = vt + D * P;
    float *dk = k + T * E, *dv = dk + T * E, *q = dv + T * E, *p = q + QUERIES * E, *dp = p + QUERIES * P;
    float *dq = dp + QUERIES * P, *dout = dq + QUERIES * E;

    for (int64_t t = 0; t < T; t++) norm_rotate(s, D, x + t * row + (H + g) * D, s->k_gain, t, 1.0f, k + t * E);
    transpose(k, E, T, D, kt, P);
    transpose(x + (H + G + g) * D, row, T, D, vt, P);
    memset(dk, 0, (size_t)(2 * T * E) * sizeof(float)); /* and dv, which follows dk */
    for (int64_t h = g * group; h < (g + 1) * group; h++)
        for (int64_t first = 0; first < T; first += QUERIES) {
            int64_t n = T - first < QUERIES ? T - first : QUERIES, low = first_key(s, first);
            int64_t keys = first + n - low, columns = padded(keys);
            for (int64_t i = 0; i < n; i++) {
                norm_rotate(s, D, x + (first + i) * row + h * D, s->q_gain, first + i, factor, q + i * E);
                for (int64_t d = 0; d < D; d++) dout[i * E + d] = s->dy[((b * T + first + i) * H + h) * D + d];
            }
            multiply(n, columns, D, q, E, 1, kt + low, P, p, P, 0);
            exponentials(p, P, n, first - low, columns, s->window, s->lse + (b * H + h) * T + first, NULL);
            multiply(n, columns, D, dout, E, 1, vt + low, P, dp, P, 0);
            multiply(keys, E, n, p, 1, P, dout, E, dv + low * E, E, 1);
            for (int64_t i = 0; i < n; i++) { /* softmax: dp = p (dp - y dy) */
                const float *out = s->y + ((b * T + first + i) * H + h) * D;
                vec dot = {0};
                for (int64_t d = 0; d < D; d += W) dot += load(out + d) * load(dout + i * E + d);
                vec mean = all(sum(dot));
                for (int64_t j = 0; j < columns; j += W)
                    store(dp + i * P + j, load(p + i * P + j) * (load(dp + i * P + j) - mean));
            }
            multiply(keys, E, n, dp, 1, P, q, E, dk + low * E, E, 1);
            multiply(n, E, keys, dp, P, 1, k + low * E, E, dq, E, 0);
            for (int64_t i = 0; i < n; i++)
                norm_rotate_backward(s, D, x + (first + i) * row + h * D, s->q_gain, first + i, factor, dq + i * E,
                          dx + (first + i) * row + h * D, dq_gain);
        }
    for (int64_t t = 0; t < T; t++) {
        int64_t key = t * row + (H + g) * D;
        norm_rotate_backward(s, D, x + key, s->k_gain, t, 1.0f, dk + t * E, dx + key, dk_gain);
        for (int64_t d = 0; d < D; d++) dx[key + G * D + d] = dv[t * E + d];
    }
}

/* ---- The block ---- */

typedef struct {
    int64_t B, T, C, H, G, D, I;
    const float *ln_1, *w_attn, *q_gain, *k_gain, *w_proj, *ln_2, *w_fc, *w_down; /* (out, in) as in nn.Linear */
    const float *cos, *sin;
    float eps, dropout;
    uint32_t seed;
} Block;

INLINE int64_t packed_width(const Block *b) { return (b->H + 2 * b->G) * b->D; }

/* Rows per chunk: a chunk and a panel of weights must fit in the first-level cache. */
INLINE int64_t chunk_size(int64_t N)
{
    int64_t each = (N / omp_get_num_threads() + ROWS - 1) / ROWS * ROWS;
    return each < ROWS ? ROWS : each < 8 * ROWS ? each : 8 * ROWS;
}

/* Dropout of row n of x (C), in place. The mask is the hash lowbias32 of (seed, site, position), so that the backward pass
 * computes the same mask. site: 0 after attention, 1 after the feed-forward. */
INLINE void drop(const Block *b, uint32_t site, int64_t n, float *x)
{
    if (b->dropout == 0) return;
    const uint32_t threshold = (uint32_t)((double)b->dropout * 4294967296.0);
    uvec counter = {0};
    for (int i = 0; i < W; i++) counter[i] = (uint32_t)(n * b->C + i) * 2 + site;
    for (int64_t c = 0; c < b->C; c += W, counter += 2 * W) {
        uvec h = (counter ^ (b->seed * 0x9E3779B9u)) + b->seed;
        h = (h ^ (h >> 16)) * 0x7FEB352Du;
        h = (h ^ (h >> 15)) * 0x846CA68Bu;
        h ^= h >> 16;
        store(x + c, choose((ivec)(h >= threshold), load(x + c) * all(1.0f / (1.0f - b->dropout)), all(0.0f)));
    }
}

INLINE void swiglu(const float *x, float *y, int64_t I)
{
    for (int64_t i = 0; i < I; i += W)
        store(y + i, load(x + i) * load(x + I + i) / (all(1.0f) + exponential(-load(x + i))));
}

/* dy (I), x (2 I) -> dx (2 I); also recomputes y (I). */
INLINE void swiglu_backward(const float *dy, const float *x, float *dx, float *y, int64_t I)
{
    for (int64_t i = 0; i < I; i += W) {
        vec gate = load(x + i), up = load(x + I + i), d = load(dy + i);
        vec sigmoid = all(1.0f) / (all(1.0f) + exponential(-gate)), silu = gate * sigmoid;
        store(y + i, silu * up);
        store(dx + i, d * up * (sigmoid + silu * (all(1.0f) - sigmoid)));
        store(dx + I + i, d * silu);
    }
}

/* Forward pass of a block: x (N, C) -> y (N, C). Stores for the backward pass: qkv (N, R), attended (N, H D), lse
 * (B, H, T), middle (N, C), inner (N, 2 I). Workspace: packed (as large as all weights). */
void block(const float *x, float *y, float *qkv, float *attended, float *lse, float *middle, float *inner, float *packed,
           const float *ln_1, const float *w_attn, const float *q_gain, const float *k_gain, const float *w_proj,
           const float *ln_2, const float *w_fc, const float *w_down, const float *cos, const float *sin, int64_t B,
           int64_t T, int64_t C, int64_t H, int64_t G, int64_t D, int64_t I, int64_t window, int64_t seed, float eps,
           float dropout, int threads)
{
    const Block b = {B, T, C, H, G, D, I, ln_1, w_attn, q_gain, k_gain, w_proj, ln_2, w_fc, w_down, cos, sin, eps, dropout,
                     (uint32_t)seed};
    const Attention a = {qkv, q_gain, k_gain, cos, sin, attended, lse, NULL, NULL, B, T, H, G, window, eps};
    const int64_t N = B * T, R = packed_width(&b);
    float *p_attn = packed, *p_proj = p_attn + R * C, *p_fc = p_proj + C * H * D, *p_down = p_fc + 2 * I * C;
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to, chunk = chunk_size(N);
        thread_range(R / PANEL, &from, &to), pack_transposed(w_attn, C, p_attn, from, to);
        thread_range(C / PANEL, &from, &to), pack_transposed(w_proj, H * D, p_proj, from, to);
        thread_range(2 * I / PANEL, &from, &to), pack_transposed(w_fc, C, p_fc, from, to);
        thread_range(C / PANEL, &from, &to), pack_transposed(w_down, I, p_down, from, to);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < N; first += chunk) {
            int64_t n = N - first < chunk ? N - first : chunk;
            float *h = scratch((size_t)(chunk * C));
            for (int64_t i = 0; i < n; i++) norm(x + (first + i) * C, ln_1, h + i * C, C, eps);
            apply(n, R, C, h, p_attn, qkv + first * R);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < B * G; task++)
            if (D == 32)
                attend(&a, task, 32);
            else
                attend(&a, task, D);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < N; first += chunk) {
            int64_t n = N - first < chunk ? N - first : chunk;
            float *h = scratch((size_t)(chunk * (C + I))), *act = h + chunk * C;
            apply(n, C, H * D, attended + first * H * D, p_proj, h);
            for (int64_t i = 0; i < n; i++) {
                int64_t at = (first + i) * C;
                drop(&b, 0, first + i, h + i * C);
                for (int64_t c = 0; c < C; c += W) store(middle + at + c, load(x + at + c) + load(h + i * C + c));
                norm(middle + at, ln_2, h + i * C, C, eps);
            }
            apply(n, 2 * I, C, h, p_fc, inner + first * 2 * I);
            for (int64_t i = 0; i < n; i++) swiglu(inner + (first + i) * 2 * I, act + i * I, I);
            apply(n, C, I, act, p_down, h);
            for (int64_t i = 0; i < n; i++) {
                int64_t at = (first + i) * C;
                drop(&b, 1, first + i, h + i * C);
                for (int64_t c = 0; c < C; c += W) store(y + at + c, load(middle + at + c) + load(h + i * C + c));
            }
        }
    }
}

/* Backward pass of a block: dy (N, C), with the inputs and stored tensors of `block` -> dx (N, C) and gradients, the
 * gradients of the weights one after another in the order ln_1, w_attn, q_gain, k_gain, w_proj, ln_2, w_fc, w_down.
 * Workspace: dattended (N, H D), dqkv (N, R), packed (as large as all weights), parts (2 threads, as large as all
 * weights). */
void block_backward(const float *dy, const float *x, const float *qkv, float *attended, float *lse, const float *middle,
                    const float *inner, float *dx, float *gradients, float *dattended, float *dqkv, float *packed,
                    float *parts, const float *ln_1, const float *w_attn, const float *q_gain, const float *k_gain,
                    const float *w_proj, const float *ln_2, const float *w_fc, const float *w_down, const float *cos,
                    const float *sin, int64_t B, int64_t T, int64_t C, int64_t H, int64_t G, int64_t D, int64_t I,
                    int64_t window, int64_t seed, float eps, float dropout, int threads)
{
    const Block b = {B, T, C, H, G, D, I, ln_1, w_attn, q_gain, k_gain, w_proj, ln_2, w_fc, w_down, cos, sin, eps, dropout,
                     (uint32_t)seed};
    const Attention a = {qkv, q_gain, k_gain, cos, sin, attended, lse, dattended, dqkv, B, T, H, G, window, eps};
    const int64_t N = B * T, R = packed_width(&b), HD = H * D, weights = 2 * C + 2 * D + (R + HD + 3 * I) * C;
    const int64_t slots = 2 * threads, chunk = 8 * ROWS;
    float *p_attn = packed, *p_proj = p_attn + R * C, *p_fc = p_proj + C * HD, *p_down = p_fc + 2 * I * C;
    /* Offsets of the weight gradients in each part. */
    const int64_t at_attn = C, at_q_gain = at_attn + R * C, at_k_gain = at_q_gain + D, at_proj = at_k_gain + D;
    const int64_t at_ln_2 = at_proj + C * HD, at_fc = at_ln_2 + C, at_down = at_fc + 2 * I * C;
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to;
        thread_range(C / PANEL, &from, &to), pack(w_attn, R, C, p_attn, from, to), pack(w_fc, 2 * I, C, p_fc, from, to);
        thread_range(HD / PANEL, &from, &to), pack(w_proj, C, HD, p_proj, from, to);
        thread_range(I / PANEL, &from, &to), pack(w_down, C, I, p_down, from, to);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t slot = 0; slot < slots; slot++) {
            float *part = memset(parts + slot * weights, 0, (size_t)weights * sizeof(float));
            slot_range(slot, slots, N, &from, &to);
            for (int64_t first = from; first < to; first += chunk) {
                int64_t n = to - first < chunk ? to - first : chunk;
                float *d = scratch((size_t)(chunk * (3 * C + 4 * I))), *h = d + chunk * C, *dh = h + chunk * C;
                float *dact = dh + chunk * C, *act = dact + chunk * I, *dinner = act + chunk * I;
                memcpy(d, dy + first * C, (size_t)(n * C) * sizeof(float));
                for (int64_t i = 0; i < n; i++) drop(&b, 1, first + i, d + i * C);
                apply(n, I, C, d, p_down, dact);
                for (int64_t i = 0; i < n; i++) {
                    swiglu_backward(dact + i * I, inner + (first + i) * 2 * I, dinner + i * 2 * I, act + i * I, I);
                    norm(middle + (first + i) * C, ln_2, h + i * C, C, eps);
                }
                multiply_outer(C, I, n, d, act, part + at_down);
                multiply_outer(2 * I, C, n, dinner, h, part + at_fc);
                apply(n, C, 2 * I, dinner, p_fc, dh);
                for (int64_t i = 0; i < n; i++) {
                    int64_t at = (first + i) * C;
                    norm_backward(dh + i * C, middle + at, ln_2, dy + at, dx + at, part + at_ln_2, C, eps);
                    memcpy(d + i * C, dx + at, (size_t)C * sizeof(float));
                    drop(&b, 0, first + i, d + i * C);
                }
                apply(n, HD, C, d, p_proj, dattended + first * HD);
                multiply_outer(C, HD, n, d, attended + first * HD, part + at_proj);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t slot = 0; slot < slots; slot++) {
            float *part = parts + slot * weights, *dq_gain = part + at_q_gain, *dk_gain = part + at_k_gain;
            slot_range(slot, slots, B * G, &from, &to);
            for (int64_t task = from; task < to; task++)
                if (D == 32)
                    attend_backward(&a, task, 32, dq_gain, dk_gain);
                else
                    attend_backward(&a, task, D, dq_gain, dk_gain);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t slot = 0; slot < slots; slot++) {
            float *part = parts + slot * weights;
            slot_range(slot, slots, N, &from, &to);
            for (int64_t first = from; first < to; first += chunk) {
                int64_t n = to - first < chunk ? to - first : chunk;
                float *h = scratch((size_t)(2 * chunk * C)), *dh = h + chunk * C;
                for (int64_t i = 0; i < n; i++) norm(x + (first + i) * C, ln_1, h + i * C, C, eps);
                multiply_outer(R, C, n, dqkv + first * R, h, part + at_attn);
                apply(n, C, R, dqkv + first * R, p_attn, dh);
                for (int64_t i = 0; i < n; i++) {
                    int64_t at = (first + i) * C;
                    norm_backward(dh + i * C, x + at, ln_1, dx + at, dx + at, part, C, eps);
                }
            }
        }
        sum_slots(parts, weights, slots, gradients);
    }
}

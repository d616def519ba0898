/* Matrix products whose operands fit in the cache.
 *
 * A product takes operands in the form that the innermost loop reads, so each matrix is converted once. An element of an
 * operand is a float, or with -DBF16 a pair of bf16 values that are neighbours along K, the dimension that is summed.
 * Sums are float32. There are two forms:
 *
 *   rows    (M, K / PAIR), row-major: the left operand of activations times weights.
 *   panels  (N / PANEL, K / PAIR, PANEL): the columns are divided into panels of PANEL columns, each contiguous. The right
 *           operand of every product; also the left one where the sum runs over rows (gradients of weights).
 */

#ifdef BF16
enum { PAIR = 2 }; /* values of a matrix per element of an operand */
typedef uint32_t operand __attribute__((may_alias));
typedef uvec operands;
#else
enum { PAIR = 1 };
typedef float operand;
typedef vec operands;
#endif

INLINE operands load_operands(const operand *p) { return (operands)load((const float *)p); }
INLINE void store_operands(operand *p, operands x) { store((float *)p, (vec)x); }
INLINE int64_t in_pairs(int64_t K) { return (K + PAIR - 1) / PAIR; }
INLINE int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

/* ---- Rounding to bf16: to nearest, ties to even; NaN stays NaN ---- */

/* The values that operands hold for x. */
INLINE vec rounded(vec x)
{
#ifdef BF16
    uvec bits = (uvec)x, even = (bits + 0x7fffu + ((bits >> 16) & 1)) & 0xffff0000u;
    return choose(x != x, x, (vec)even);
#else
    return x;
#endif
}

#if defined(BF16) && defined(__AVX512BF16__)
/* sums + product of the low halves + product of the high halves. */
INLINE vec multiply_add(vec sums, operands a, operands b)
{
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}

/* The values of row k of a matrix and of row k + 1 -> pairs of both. */
INLINE operands combine(const vec *x)
{
    typedef int16_t lanes __attribute__((vector_size(64)));
    const lanes order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    return (operands)_mm512_permutexvar_epi16((__m512i)order, halves);
}

/* Stores W values of one row as W / 2 pairs of neighbours. */
INLINE void store_row(operand *p, vec x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }

#elif defined(BF16) /* for tests on processors without these instructions */

INLINE vec multiply_add(vec sums, operands a, operands b)
{
    return sums + (vec)(a << 16) * (vec)(b << 16) + (vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u);
}

INLINE operands combine(const vec *x) { return (uvec)rounded(x[0]) >> 16 | (uvec)rounded(x[1]); }

INLINE void store_row(operand *p, vec x)
{
    uvec bits = (uvec)rounded(x);
    for (int i = 0; i < W; i += 2) p[i / 2] = bits[i] >> 16 | bits[i + 1];
}

#else /* float32 */

INLINE vec multiply_add(vec sums, operands a, operands b) { return sums + a * b; }
INLINE operands combine(const vec *x) { return x[0]; }
INLINE void store_row(operand *p, vec x) { store(p, x); }

#endif

/* ---- Conversion of matrices into operands ---- */

/* The n values of x, contiguous rows of an even length, in the form of rows; y is the memory for them. */
INLINE const operand *in_rows(const float *x, int64_t n, operand *y)
{
#ifdef BF16
    for (int64_t i = 0; i < n; i += W) store_row(y + i / PAIR, load(x + i));
    return y;
#else
    return (void)n, (void)y, x;
#endif
}

/* The panels [from, to) of x (K, N), whose rows are ld apart. For odd K the last row is paired with zeros. */
static void pack(const float *x, int64_t ld, int64_t K, int64_t from, int64_t to, operand *y)
{
    const int64_t pairs = in_pairs(K);
    for (int64_t n = from * PANEL; n < to * PANEL; n += W) {
        operand *out = y + n / PANEL * PANEL * pairs + n % PANEL;
        for (int64_t k = 0; k < K; k += PAIR, out += PANEL) {
            vec two[2] = {load(x + k * ld + n), {0}};
            if (PAIR == 2 && k + 1 < K) two[1] = load(x + (k + 1) * ld + n);
            store_operands(out, combine(two));
        }
    }
}

/* x (K, N) in the form of panels; y is the memory for them. */
INLINE const operand *in_panels(const float *x, int64_t K, int64_t N, operand *y)
{
    pack(x, N, K, 0, N / PANEL, y);
    return y;
}

/* The panels [from, to) of the transpose of x (N, K), whose rows are ld apart. */
static void pack_transposed(const float *x, int64_t ld, int64_t K, int64_t from, int64_t to, operand *y)
{
    const int64_t pairs = K / PAIR;
    for (int64_t n = from * PANEL; n < to * PANEL; n += W)
        for (int64_t k = 0; k < pairs; k += W) {
            const int64_t some = pairs - k < W ? pairs - k : W;
            operand rows[W * W];
            for (int64_t i = 0; i < W; i++)
                for (int64_t j = 0; j < some * PAIR; j += W)
                    store_row(rows + i * W + j / PAIR, load(x + (n + i) * ld + k * PAIR + j));
            transpose((float *)rows, W, some, (float *)y + n / PANEL * PANEL * pairs + k * PANEL + n % PANEL, PANEL);
        }
}

/* ---- Products ---- */

/* c (rows, PANEL) = a (rows, K) b (K, PANEL), or += if `add`, with K counted in elements of operands; element (r, k) of a
 * is a[r * ar + k * ak]. */
#define TILE(rows)                                                                                                     \
    INLINE void tile_##rows(const operand *a, int64_t ar, int64_t ak, const operand *b, int64_t K, float *c,           \
                            int64_t ldc, int add)                                                                      \
    {                                                                                                                  \
        vec left[rows], right[rows];                                                                                   \
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) left[r] = right[r] = (vec){0};                          \
        for (int64_t k = 0; k < K; k++) {                                                                              \
            operands b0 = load_operands(b + k * PANEL), b1 = load_operands(b + k * PANEL + W);                         \
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)                                                     \
            {                                                                                                          \
                operands x = a[r * ar + k * ak] - (operands){0};                                                       \
                left[r] = multiply_add(left[r], x, b0);                                                                \
                right[r] = multiply_add(right[r], x, b1);                                                              \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)                                                         \
        {                                                                                                              \
            float *p = c + r * ldc;                                                                                    \
            store(p, add ? load(p) + left[r] : left[r]);                                                               \
            store(p + W, add ? load(p + W) + right[r] : right[r]);                                                     \
        }                                                                                                              \
    }
TILE(1)
TILE(4)
#ifdef __AVX512F__
TILE(8)
#define TILE_OF_ROWS tile_8
#else
TILE(6)
#define TILE_OF_ROWS tile_6
#endif

/* c (M, N) = a (M, K) b (K, N), or += if `add`, with K counted in elements of operands. b is in panels that start
 * PANEL * step elements apart; step is larger than K if b is a part of more rows. N is a multiple of PANEL. */
static void product(int64_t M, int64_t N, int64_t K, const operand *a, int64_t ar, int64_t ak, const operand *b,
                    int64_t step, float *c, int64_t ldc, int add)
{
    for (int64_t n = 0; n < N; n += PANEL) {
        int64_t m = 0;
        for (; m + ROWS <= M; m += ROWS) TILE_OF_ROWS(a + m * ar, ar, ak, b + n * step, K, c + m * ldc + n, ldc, add);
        for (; m + 4 <= M; m += 4) tile_4(a + m * ar, ar, ak, b + n * step, K, c + m * ldc + n, ldc, add);
        for (; m < M; m++) tile_1(a + m * ar, ar, ak, b + n * step, K, c + m * ldc + n, ldc, add);
    }
}

/* c (M, N) = a (M, K) b (K, N), or += if `add`; a in rows, b in panels. */
INLINE void multiply(int64_t M, int64_t N, int64_t K, const operand *a, const operand *b, float *c, int add)
{
    product(M, N, K / PAIR, a, K / PAIR, 1, b, K / PAIR, c, N, add);
}

/* Gradient of a weight: c (M, N) += a' b with a (K, M) and b (K, N), both in panels. */
static void add_outer(int64_t M, int64_t N, int64_t K, const operand *a, const operand *b, float *c)
{
    const int64_t pairs = in_pairs(K);
    for (int64_t m = 0; m < M; m += PANEL) product(PANEL, N, pairs, a + m * pairs, 1, PANEL, b, pairs, c + m * N, N, 1);
}

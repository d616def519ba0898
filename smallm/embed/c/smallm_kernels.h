/* The arithmetic of smallm.c, included once for each instruction set.

   Before each inclusion: SUFFIX names the instruction set (avx512, avx2, sse2, neon, wasm, plain), TARGET is an attribute
   that lets the compiler use it, and one of the macros SMALLM_AVX512, SMALLM_AVX2, SMALLM_SSE2, SMALLM_NEON, SMALLM_WASM,
   SMALLM_PLAIN is 1.

   Every instruction set gives the same bits, because SAMPLING.md fixes the order of all sums:
   - The outputs of a product are computed 16 at a time (a panel); each output adds its terms in the order of the inputs.
   - Sums over a row (norms, softmax) have 16 partial sums, for the indices modulo 16, which are then added in pairs:
     8 + 8, 4 + 4, 2 + 2, 1 + 1.
   - A multiplication and an addition are never fused. */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define K(name) JOIN(name, SUFFIX)

/* -- vectors of LANES floats, and of LANES integers. At a time a product computes at most ROWS rows, PANELS panels and TILES
      pairs of both, or one panel: as many as there are registers for their sums. -- */

#if SMALLM_AVX512
enum { K(LANES) = 16, K(ROWS) = 12, K(PANELS) = 6, K(TILES) = 6 };
typedef __m512 K(vec);
typedef __m512i K(ints);
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define ALL(f) _mm512_set1_ps(f)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define DIV(a, b) _mm512_div_ps(a, b)
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#define POWER_OF_2(v) /* 2^n of n + ROUNDER */ _mm512_castsi512_ps( \
    _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(v), 23), _mm512_set1_epi32(127 << 23)))
#define LOAD_INTS(p) _mm512_loadu_si512((const void *)(p))
#define ALL_INTS(i) _mm512_set1_epi32(i)
#define TO_FLOAT(i) _mm512_cvtepi32_ps(i)
#define ADD_INTS(a, b) _mm512_add_epi32(a, b)
#define DOT4(sum, x, w) K(dot4)(sum, x, w)
/* Of x + 128, which the correction takes back. Assembly, for GCC copies the sums before and after its intrinsic function. */
static INLINE TARGET __m512i K(dot4)(__m512i sum, __m512i x, __m512i w)
{
    x = _mm512_xor_si512(x, _mm512_set1_epi8((char)0x80));
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "vm"(w));
    return sum;
}
#define START(p) LOAD_INTS(p)
#define LOW_BYTES(p, v) _mm_storeu_si128((__m128i *)(void *)(p), _mm512_cvtepi32_epi8(_mm512_castps_si512((v)[0])))
#elif SMALLM_AVX2
enum { K(LANES) = 8, K(ROWS) = 6, K(PANELS) = 6, K(TILES) = 6 };
typedef __m256 K(vec);
typedef __m256i K(ints);
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define ALL(f) _mm256_set1_ps(f)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define DIV(a, b) _mm256_div_ps(a, b)
#define MAX(a, b) _mm256_max_ps(a, b)
#define MIN(a, b) _mm256_min_ps(a, b)
#define POWER_OF_2(v) _mm256_castsi256_ps( \
    _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(v), 23), _mm256_set1_epi32(127 << 23)))
#define LOAD_INTS(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define ALL_INTS(i) _mm256_set1_epi32(i)
#define TO_FLOAT(i) _mm256_cvtepi32_ps(i)
#define ADD_INTS(a, b) _mm256_add_epi32(a, b)
#define DOT4(sum, x, w) /* |w| * (x * sign of w): sums of two products fit into 16 bits */ \
    _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), \
                                            _mm256_set1_epi16(1)))
#define LOW_BYTES(p, v) K(low_bytes)(p, v)
static INLINE TARGET void K(low_bytes)(int8_t *p, const __m256 *v)
{
    __m256i low = _mm256_set1_epi32(255), a = _mm256_castps_si256(v[0]), b = _mm256_castps_si256(v[1]);
    __m256i pairs = _mm256_packs_epi32(_mm256_and_si256(a, low), _mm256_and_si256(b, low)); /* a0-3 b0-3 a4-7 b4-7 */
    pairs = _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0));
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128((__m128i *)(void *)p, bytes);
}
#elif SMALLM_SSE2
enum { K(LANES) = 4, K(ROWS) = 3, K(PANELS) = 3, K(TILES) = 3 };
typedef __m128 K(vec);
typedef __m128i K(ints);
#define LOAD(p) _mm_loadu_ps(p)
#define STORE(p, v) _mm_storeu_ps(p, v)
#define ALL(f) _mm_set1_ps(f)
#define ADD(a, b) _mm_add_ps(a, b)
#define SUB(a, b) _mm_sub_ps(a, b)
#define MUL(a, b) _mm_mul_ps(a, b)
#define DIV(a, b) _mm_div_ps(a, b)
#define MAX(a, b) _mm_max_ps(a, b)
#define MIN(a, b) _mm_min_ps(a, b)
#define POWER_OF_2(v) \
    _mm_castsi128_ps(_mm_add_epi32(_mm_slli_epi32(_mm_castps_si128(v), 23), _mm_set1_epi32(127 << 23)))
#define LOAD_INTS(p) _mm_loadu_si128((const __m128i *)(const void *)(p))
#define ALL_INTS(i) _mm_set1_epi32(i)
#define TO_FLOAT(i) _mm_cvtepi32_ps(i)
#define ADD_INTS(a, b) _mm_add_epi32(a, b)
#define DOT4(sum, x, w) K(dot4)(sum, x, w)
static INLINE TARGET __m128i K(dot4)(__m128i sum, __m128i x, __m128i w)
{
    __m128i four = _mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8); /* x repeats its four numbers */
    __m128i low = _mm_madd_epi16(four, _mm_srai_epi16(_mm_unpacklo_epi8(w, w), 8));
    __m128i high = _mm_madd_epi16(four, _mm_srai_epi16(_mm_unpackhi_epi8(w, w), 8));
    __m128 even = _mm_shuffle_ps(_mm_castsi128_ps(low), _mm_castsi128_ps(high), _MM_SHUFFLE(2, 0, 2, 0));
    __m128 odd = _mm_shuffle_ps(_mm_castsi128_ps(low), _mm_castsi128_ps(high), _MM_SHUFFLE(3, 1, 3, 1));
    return _mm_add_epi32(sum, _mm_add_epi32(_mm_castps_si128(even), _mm_castps_si128(odd)));
}
#define LOW_BYTES(p, v) K(low_bytes)(p, v)
static INLINE TARGET void K(low_bytes)(int8_t *p, const __m128 *v)
{
    __m128i low = _mm_set1_epi32(255), part[4];
    for (int i = 0; i < 4; i++) part[i] = _mm_and_si128(_mm_castps_si128(v[i]), low);
    part[0] = _mm_packus_epi16(_mm_packs_epi32(part[0], part[1]), _mm_packs_epi32(part[2], part[3]));
    _mm_storeu_si128((__m128i *)(void *)p, part[0]);
}
#elif SMALLM_NEON
enum { K(LANES) = 4, K(ROWS) = 4, K(PANELS) = 4, K(TILES) = 6 };
typedef float32x4_t K(vec);
typedef int32x4_t K(ints);
#define LOAD(p) vld1q_f32(p)
#define STORE(p, v) vst1q_f32(p, v)
#define ALL(f) vdupq_n_f32(f)
#define ADD(a, b) vaddq_f32(a, b)
#define SUB(a, b) vsubq_f32(a, b)
#define MUL(a, b) vmulq_f32(a, b)
#define DIV(a, b) vdivq_f32(a, b)
#define MAX(a, b) vmaxq_f32(a, b)
#define MIN(a, b) vminq_f32(a, b)
#define POWER_OF_2(v) \
    vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(v), 23), vdupq_n_s32(127 << 23)))
#define LOAD_INTS(p) vreinterpretq_s32_s8(vld1q_s8((const int8_t *)(p)))
#define ALL_INTS(i) vdupq_n_s32(i)
#define TO_FLOAT(i) vcvtq_f32_s32(i)
#define ADD_INTS(a, b) vaddq_s32(a, b)
#if defined(__ARM_FEATURE_DOTPROD)
#define DOT4(sum, x, w) vdotq_s32(sum, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w))
#else
#define DOT4(sum, x, w) K(dot4)(sum, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(w))
static INLINE int32x4_t K(dot4)(int32x4_t sum, int8x16_t x, int8x16_t w)
{
    int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(w)), high = vmull_high_s8(x, w);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#endif
#define LOW_BYTES(p, v) K(low_bytes)(p, v)
static INLINE void K(low_bytes)(int8_t *p, const float32x4_t *v)
{
    int16x4_t part[4];
    for (int i = 0; i < 4; i++) part[i] = vmovn_s32(vreinterpretq_s32_f32(v[i]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(vcombine_s16(part[0], part[1])), vmovn_s16(vcombine_s16(part[2], part[3]))));
}
#elif SMALLM_WASM
enum { K(LANES) = 4, K(ROWS) = 4, K(PANELS) = 1, K(TILES) = 4 };
typedef v128_t K(vec);
/* Weights are numbers of 16 bits, and so are the four inputs, repeated in `low`. Sums have two parts for each output, for the
   first and the last two of four products, which TO_FLOAT adds: one addition per product of two vectors, and no shuffles. */
typedef struct {
    v128_t low, high;
} K(ints);
#define LOAD(p) wasm_v128_load(p)
#define STORE(p, v) wasm_v128_store(p, v)
#define ALL(f) wasm_f32x4_splat(f)
#define ADD(a, b) wasm_f32x4_add(a, b)
#define SUB(a, b) wasm_f32x4_sub(a, b)
#define MUL(a, b) wasm_f32x4_mul(a, b)
#define DIV(a, b) wasm_f32x4_div(a, b)
#define MAX(a, b) wasm_f32x4_pmax(b, a)
#define MIN(a, b) wasm_f32x4_pmin(b, a)
#define POWER_OF_2(v) wasm_i32x4_add(wasm_i32x4_shl(v, 23), wasm_i32x4_splat(127 << 23))
#define LOAD_INTS(p) (K(ints)){wasm_i16x8_load8x8(p), wasm_i16x8_load8x8((p) + 8)}
#define ALL_INTS(i) (K(ints)){wasm_i16x8_extend_low_i8x16(wasm_i32x4_splat(i)), wasm_i32x4_splat(0)}
#define ADD_INTS(a, b) (K(ints)){wasm_i32x4_add((a).low, (b).low), wasm_i32x4_add((a).high, (b).high)}
#define TO_FLOAT(i) \
    wasm_f32x4_convert_i32x4(wasm_i32x4_add(wasm_i32x4_shuffle((i).low, (i).high, 0, 2, 4, 6), \
                                            wasm_i32x4_shuffle((i).low, (i).high, 1, 3, 5, 7)))
#define LOAD_PART(p, v) K(load_part)(p, v)
/* Vector `part` at p. clang cannot rule out that an address wraps around, and would add it up before each load. */
static INLINE v128_t K(load_part)(const float *p, const int part)
{
    v128_t v;
    __asm__("local.get %1\n\tv128.load %2:p2align=2\n\tlocal.set %0"
            : "=r"(v) : "r"(p), "i"(16 * part), "m"(*(const float(*)[16])p));
    return v;
}
#define DOT4(sum, x, w) (K(ints)){ \
    wasm_i32x4_add((sum).low, wasm_i32x4_dot_i16x8((x).low, (w).low)), \
    wasm_i32x4_add((sum).high, wasm_i32x4_dot_i16x8((x).low, (w).high))}
#define LOW_BYTES(p, v) K(low_bytes)(p, v)
static INLINE void K(low_bytes)(int8_t *p, const v128_t *v)
{
    v128_t low = wasm_i32x4_splat(255), part[4];
    for (int i = 0; i < 4; i++) part[i] = wasm_v128_and(v[i], low);
    part[0] = wasm_i16x8_narrow_i32x4(part[0], part[1]), part[2] = wasm_i16x8_narrow_i32x4(part[2], part[3]);
    wasm_v128_store(p, wasm_u8x16_narrow_i16x8(part[0], part[2]));
}
#else
enum { K(LANES) = 1, K(ROWS) = 2, K(PANELS) = 1, K(TILES) = 2 };
typedef float K(vec);
typedef int32_t K(ints);
#define LOAD(p) (*(p))
#define STORE(p, v) (*(p) = (v))
#define ALL(f) (f)
#define ADD(a, b) ((a) + (b))
#define SUB(a, b) ((a) - (b))
#define MUL(a, b) ((a) * (b))
#define DIV(a, b) ((a) / (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define POWER_OF_2(v) K(power_of_2)(v)
#define LOAD_INTS(p) K(load_int)(p)
#define ALL_INTS(i) (i)
#define TO_FLOAT(i) ((float)(i))
#define ADD_INTS(a, b) ((a) + (b))
#define DOT4(sum, x, w) K(dot4)(sum, x, w)
static INLINE float K(power_of_2)(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    bits = (bits << 23) + (127u << 23);
    memcpy(&v, &bits, sizeof v);
    return v;
}
static INLINE int32_t K(load_int)(const void *p)
{
    int32_t i;
    memcpy(&i, p, sizeof i);
    return i;
}
static INLINE int32_t K(dot4)(int32_t sum, int32_t x, int32_t w)
{
    int8_t a[4], b[4];
    memcpy(a, &x, sizeof a);
    memcpy(b, &w, sizeof b);
    return sum + a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
}
#define LOW_BYTES(p, v) K(low_bytes)(p, v)
static INLINE void K(low_bytes)(int8_t *p, const float *v)
{
    for (int i = 0; i < 16; i++) {
        int32_t bits;
        memcpy(&bits, &v[i], sizeof bits);
        p[i] = (int8_t)(uint8_t)(bits & 255);
    }
}
#endif

#ifndef START
#define START(p) ALL_INTS(0)
#endif
#ifndef LOAD_PART
#define LOAD_PART(p, v) LOAD((p) + (v) * K(LANES))
#endif

/* Runs `call` for all rows: for `count` of them from row r on, at most ROWS. count is a constant in each of the calls. */
#define EACH_STRIPE(call)                                \
    for (size_t r = 0, end_ = rows; r < end_;)           \
        STRIPE(12, call) STRIPE(6, call) STRIPE(5, call) STRIPE(4, call) STRIPE(3, call) STRIPE(2, call) STRIPE(1, call) {}
#define STRIPE(n, call)                                  \
    if ((n) <= K(ROWS) && end_ - r >= (n)) {             \
        enum { count = (n) <= K(ROWS) ? (n) : 1 };       \
        call;                                            \
        r += (n);                                        \
    } else

enum {
    K(PARTS) = 16 / K(LANES),                             /* vectors in a panel */
    K(SUMS) = K(ROWS) > K(TILES) ? K(ROWS) : K(TILES),    /* pairs of a row and a panel, at most */
    K(FEW) = K(ROWS) < K(TILES) ? K(ROWS) : K(TILES)      /* rows that are always computed together */
};

/* -- products: y (rows, panels * 16) = x (rows, inputs) times panels (panels, inputs, 16) -- */

/* Computes rows x panels of a product; both numbers are constants where this is inlined. */
static INLINE TARGET void K(tile)(const float *x, size_t x_stride, const float *w, size_t panel_stride, size_t inputs,
                                  float *y, size_t y_stride, const int rows, const int panels)
{
    K(vec) sum[K(SUMS)][K(PARTS)];
    UNROLL for (int t = 0; t < rows * panels; t++)
        UNROLL for (int v = 0; v < K(PARTS); v++) sum[t][v] = ALL(0.0f);
    for (const float *end = x + inputs; x != end; x++, w += 16) {
        UNROLL for (int p = 0; p < panels; p++) {
            const float *weights = w + (size_t)p * panel_stride;
            K(vec) part[K(PARTS)];
            UNROLL for (int v = 0; v < K(PARTS); v++) part[v] = LOAD_PART(weights, v);
            UNROLL for (int r = 0; r < rows; r++) {
                K(vec) input = ALL(x[(size_t)r * x_stride]);
                UNROLL for (int v = 0; v < K(PARTS); v++)
                    sum[r * panels + p][v] = ADD(sum[r * panels + p][v], MUL(input, part[v]));
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++)
            UNROLL for (int v = 0; v < K(PARTS); v++)
                STORE(y + (size_t)r * y_stride + 16 * p + v * K(LANES), sum[r * panels + p][v]);
}

/* All panels of a few rows, a constant number. */
static INLINE TARGET void K(stripe)(const float *x, size_t x_stride, const float *w, size_t panel_stride, size_t inputs,
                                    size_t panels, float *y, size_t y_stride, const int rows)
{
    const int fit = K(TILES) / rows, together = fit < 1 ? 1 : fit < K(PANELS) ? fit : K(PANELS);
    size_t p = 0;
    for (; p + (size_t)together <= panels; p += (size_t)together)
        K(tile)(x, x_stride, w + p * panel_stride, panel_stride, inputs, y + 16 * p, y_stride, rows, together);
    for (; together > 2 && p + 2 <= panels; p += 2)
        K(tile)(x, x_stride, w + p * panel_stride, panel_stride, inputs, y + 16 * p, y_stride, rows, 2);
    for (; p < panels; p++)
        K(tile)(x, x_stride, w + p * panel_stride, panel_stride, inputs, y + 16 * p, y_stride, rows, 1);
}

/* One row. This is a function of its own because WebAssembly engines optimise a small function sooner. */
static TARGET void K(product_row)(const float *x, const float *w, size_t panel_stride, size_t inputs, size_t panels,
                                  float *y)
{
    K(stripe)(x, 0, w, panel_stride, inputs, panels, y, 0, 1);
}

static TARGET void K(product)(const float *x, size_t x_stride, size_t rows, const float *w, size_t panel_stride,
                              size_t inputs, size_t panels, float *y, size_t y_stride)
{
    if (rows == 1) {
        K(product_row)(x, w, panel_stride, inputs, panels, y);
        return;
    }
    size_t group = rows > K(FEW) ? 1 : panels; /* many rows take each panel while it is in the first cache */
    size_t lines = inputs / rows + 1; /* of 64 bytes of the next panel to fetch per row */
    for (size_t p = 0; p < panels; p += group)
        EACH_STRIPE(fetch(w + (p + group) * panel_stride, p + group < panels ? inputs : 0, r * lines, count * lines);
                    K(stripe)(x + r * x_stride, x_stride, w + p * panel_stride, panel_stride, inputs, group,
                              y + r * y_stride + 16 * p, y_stride, count));
}

/* -- products in 8 bits: x with a scale per block, weights with a scale per output and block. The sums within a block are
      exact; the blocks are added in order. -- */

static INLINE TARGET void K(tile8)(const int8_t *x, const float *x_scales, size_t x_stride, const matrix *w,
                                   size_t panel, float *y, size_t y_stride, const int rows, const int panels)
{
    /* Few sums at a time are computed in two parts each, so that an addition need not wait for the one before. */
    const int split = K(PARTS) < 4 && K(TILES) / (rows * panels) > 1 ? 2 : 1;
    size_t blocks = w->blocks, block = w->block, stride = w->stride;
    K(vec) sum[K(SUMS)][K(PARTS)];
    UNROLL for (int t = 0; t < rows * panels; t++)
        UNROLL for (int v = 0; v < K(PARTS); v++) sum[t][v] = ALL(0.0f);
    for (size_t b = 0; b < blocks; b++) {
        K(ints) exact[2 * K(SUMS)][K(PARTS)];
        const int8_t *codes = w->codes + (panel * stride + b) * block * 16;
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int p = 0; p < panels; p++)
                UNROLL for (int v = 0; v < K(PARTS); v++) {
                    exact[r * panels + p][v] =
                        START(w->corrections + ((panel + (size_t)p) * stride + b) * 16 + v * K(LANES));
                    exact[K(SUMS) + r * panels + p][v] = ALL_INTS(0);
                }
        for (size_t k = 0; k < block / 4; k += (size_t)split)
            UNROLL for (int s = 0; s < split; s++)
                UNROLL for (int p = 0; p < panels; p++) {
                    const int8_t *weights = codes + (size_t)p * stride * block * 16 + 64 * (k + (size_t)s);
                    K(ints) part[K(PARTS)];
                    UNROLL for (int v = 0; v < K(PARTS); v++) part[v] = LOAD_INTS(weights + 4 * v * K(LANES));
                    UNROLL for (int r = 0; r < rows; r++) {
                        const int to = s * K(SUMS) + r * panels + p;
                        int32_t four;
                        memcpy(&four, x + (size_t)r * x_stride + b * block + 4 * (k + (size_t)s), sizeof four);
                        K(ints) input = ALL_INTS(four);
                        UNROLL for (int v = 0; v < K(PARTS); v++) exact[to][v] = DOT4(exact[to][v], input, part[v]);
                    }
                }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int p = 0; p < panels; p++) {
                K(vec) scale = ALL(x_scales[(size_t)r * blocks + b]);
                const float *scales = w->scales + ((panel + (size_t)p) * stride + b) * 16;
                const int t = r * panels + p;
                UNROLL for (int v = 0; v < K(PARTS); v++) {
                    if (split > 1) exact[t][v] = ADD_INTS(exact[t][v], exact[K(SUMS) + t][v]);
                    sum[t][v] = ADD(sum[t][v], MUL(MUL(TO_FLOAT(exact[t][v]), LOAD(scales + v * K(LANES))), scale));
                }
            }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < panels; p++)
            UNROLL for (int v = 0; v < K(PARTS); v++)
                STORE(y + (size_t)r * y_stride + 16 * p + v * K(LANES), sum[r * panels + p][v]);
}

static INLINE TARGET void K(stripe8)(const int8_t *x, const float *x_scales, size_t x_stride, const matrix *w, size_t p,
                                     size_t end, float *y, size_t y_stride, const int rows)
{
    const int fit = K(TILES) / rows, together = fit < 1 ? 1 : fit < K(PANELS) ? fit : K(PANELS);
    for (; p + (size_t)together <= end; p += (size_t)together)
        K(tile8)(x, x_scales, x_stride, w, p, y + 16 * p, y_stride, rows, together);
    for (; together > 2 && p + 2 <= end; p += 2)
        K(tile8)(x, x_scales, x_stride, w, p, y + 16 * p, y_stride, rows, 2);
    for (; p < end; p++)
        K(tile8)(x, x_scales, x_stride, w, p, y + 16 * p, y_stride, rows, 1);
}

static TARGET void K(product8_row)(const int8_t *x, const float *x_scales, const matrix *w, float *y)
{
    K(stripe8)(x, x_scales, 0, w, 0, w->panels, y, 0, 1);
}

static TARGET void K(product8)(const int8_t *x, const float *x_scales, size_t x_stride, size_t rows, const matrix *w,
                               float *y, size_t y_stride)
{
    if (rows == 1) {
        K(product8_row)(x, x_scales, w, y);
        return;
    }
    size_t group = rows > K(FEW) ? 1 : w->panels;
    size_t all = w->blocks * w->block / 4, lines = all / rows + 1;
    for (size_t p = 0; p < w->panels; p += group)
        EACH_STRIPE(fetch(w->codes + (p + group) * w->stride * w->block * 16, p + group < w->panels ? all : 0, r * lines,
                          count * lines);
                    K(stripe8)(x + r * x_stride, x_scales + r * w->blocks, x_stride, w, p, p + group,
                               y + r * y_stride, y_stride, count));
}

/* -- rows, whose lengths are multiples of 16 -- */

static INLINE TARGET float K(add_16)(const K(vec) *sum)
{
    float part[16];
    UNROLL for (int v = 0; v < K(PARTS); v++) STORE(part + v * K(LANES), sum[v]);
    UNROLL for (int half = 8; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; i++) part[i] = part[i] + part[i + half];
    return part[0];
}

static INLINE TARGET float K(largest_of)(const K(vec) *numbers)
{
    float part[16];
    UNROLL for (int v = 0; v < K(PARTS); v++) STORE(part + v * K(LANES), numbers[v]);
    UNROLL for (int half = 8; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; i++) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

/* y = x / sqrt(mean(x^2) + 1e-6) * gain (RMSNorm, Zhang and Sennrich 2019). */
static TARGET void K(norm)(const float *x, const float *gain, float *y, size_t length)
{
    K(vec) sum[K(PARTS)];
    for (int v = 0; v < K(PARTS); v++) sum[v] = ALL(0.0f);
    for (size_t i = 0; i < length; i += 16)
        UNROLL for (int v = 0; v < K(PARTS); v++) {
            K(vec) part = LOAD(x + i + v * K(LANES));
            sum[v] = ADD(sum[v], MUL(part, part));
        }
    K(vec) scale = ALL(1.0f / sqrtf(K(add_16)(sum) / (float)length + 1e-6f));
    for (size_t i = 0; i < length; i += K(LANES)) STORE(y + i, MUL(MUL(LOAD(x + i), scale), LOAD(gain + i)));
}

/* e^x for x from -87 to 87: 2^n times a polynomial in the remainder, with an error of about 1e-7. */
static INLINE TARGET K(vec) K(exponential)(K(vec) x)
{
    x = MIN(MAX(x, ALL(-87.0f)), ALL(87.0f));
    K(vec) n = ADD(MUL(x, ALL(1.44269504f)), ALL(ROUNDER)), whole = SUB(n, ALL(ROUNDER));
    K(vec) r = SUB(SUB(x, MUL(whole, ALL(0.693359375f))), MUL(whole, ALL(-2.12194440e-4f))); /* ln 2 in two parts */
    K(vec) e = ALL(1.9875691500e-4f);
    e = ADD(MUL(e, r), ALL(1.3981999507e-3f));
    e = ADD(MUL(e, r), ALL(8.3334519073e-3f));
    e = ADD(MUL(e, r), ALL(4.1665795894e-2f));
    e = ADD(MUL(e, r), ALL(1.6666665459e-1f));
    e = ADD(MUL(e, r), ALL(5.0000001201e-1f));
    e = ADD(ADD(MUL(MUL(e, r), r), r), ALL(1.0f));
    return MUL(e, POWER_OF_2(n));
}

/* y = gate / (1 + e^-gate) * up (SwiGLU, Shazeer 2020). */
static TARGET void K(swiglu)(const float *gate, const float *up, float *y, size_t length)
{
    for (size_t i = 0; i < length; i += K(LANES)) {
        K(vec) g = LOAD(gate + i), e = K(exponential)(SUB(ALL(0.0f), g));
        STORE(y + i, MUL(DIV(g, ADD(ALL(1.0f), e)), LOAD(up + i)));
    }
}

/* Replaces the scores of the positions `first` to `end` - 1 by e^(score - largest), and the others between `from` and
   `padded` by 0; returns their sum. from and padded are multiples of 16. */
static TARGET float K(softmax)(float *scores, size_t from, size_t first, size_t end, size_t padded)
{
    K(vec) sum[K(PARTS)], part[K(PARTS)];
    for (size_t i = from; i < first; i++) scores[i] = -FLT_MAX;
    for (size_t i = end; i < padded; i++) scores[i] = -FLT_MAX;
    UNROLL for (int v = 0; v < K(PARTS); v++) sum[v] = ALL(0.0f), part[v] = ALL(-FLT_MAX);
    for (size_t i = from; i < padded; i += 16)
        UNROLL for (int v = 0; v < K(PARTS); v++) part[v] = MAX(part[v], LOAD(scores + i + v * K(LANES)));
    K(vec) largest = ALL(K(largest_of)(part));
    for (size_t i = from; i < padded; i += 16)
        UNROLL for (int v = 0; v < K(PARTS); v++)
            STORE(scores + i + v * K(LANES), K(exponential)(SUB(LOAD(scores + i + v * K(LANES)), largest)));
    for (size_t i = from; i < first; i++) scores[i] = 0;
    for (size_t i = end; i < padded; i++) scores[i] = 0;
    for (size_t i = from; i < padded; i += 16)
        UNROLL for (int v = 0; v < K(PARTS); v++) sum[v] = ADD(sum[v], LOAD(scores + i + v * K(LANES)));
    return K(add_16)(sum);
}

/* x = x * factors. */
static TARGET void K(scale)(float *x, const float *factors, size_t length)
{
    for (size_t i = 0; i < length; i += K(LANES)) STORE(x + i, MUL(LOAD(x + i), LOAD(factors + i)));
}

/* e^x of double-precision numbers up to 0, whose number is a multiple of 8, which compilers turn into vectors. */
static TARGET void K(exponentials)(double *x, size_t count)
{
    for (; count > 0; count -= 8, x += 8)
        for (int i = 0; i < 8; i++) x[i] = exponential(x[i]);
}

/* Rounds a row to 8 bits: x = code * scale for each block. The scale of a block that is not finite is NaN. */
static TARGET void K(quantise)(const float *x, size_t inputs, size_t blocks, size_t block, int8_t *codes, float *scales)
{
    for (size_t b = 0; b < blocks; b++) {
        K(vec) largest[K(PARTS)], finite[K(PARTS)];
        float tail[16] = {0};
        size_t from = b * block, whole = inputs - from < block ? (inputs - from) / 16 * 16 : block;
        size_t rest = inputs - from - whole < 16 ? inputs - from - whole : 0;
        memcpy(tail, x + from + whole, (whole < block ? rest : 0) * sizeof *x);
        UNROLL for (int v = 0; v < K(PARTS); v++) largest[v] = finite[v] = ALL(0.0f);
        for (size_t i = 0; i <= whole && i < block; i += 16)
            UNROLL for (int v = 0; v < K(PARTS); v++) {
                K(vec) part = LOAD((i < whole ? x + from + i : tail) + v * K(LANES));
                largest[v] = MAX(largest[v], MAX(part, SUB(ALL(0.0f), part)));
                finite[v] = ADD(finite[v], SUB(part, part)); /* 0, or NaN */
            }
        float size = K(largest_of)(largest), inverse = size > 0 ? 127.0f / size : 0;
        scales[b] = (size + K(add_16)(finite)) / 127.0f;
        for (size_t i = 0; i < block; i += 16) {
            K(vec) rounded[K(PARTS)]; /* to the nearest integer, ties to even, in the low bits of the float */
            UNROLL for (int v = 0; v < K(PARTS); v++) {
                K(vec) part = i <= whole ? LOAD((i < whole ? x + from + i : tail) + v * K(LANES)) : ALL(0.0f);
                rounded[v] = ADD(MIN(MAX(MUL(part, ALL(inverse)), ALL(-127.0f)), ALL(127.0f)), ALL(ROUNDER));
            }
            LOW_BYTES(codes + from + i, rounded);
        }
    }
}

static const kernels K(KERNELS) = {
    K(product), K(product8), K(norm), K(swiglu), K(softmax), K(scale), K(exponentials), K(quantise), K(LANES)};

#undef LOAD
#undef LOAD_PART
#undef STORE
#undef ALL
#undef ADD
#undef SUB
#undef MUL
#undef DIV
#undef MAX
#undef MIN
#undef POWER_OF_2
#undef LOAD_INTS
#undef ALL_INTS
#undef TO_FLOAT
#undef ADD_INTS
#undef DOT4
#undef LOW_BYTES
#undef START
#undef EACH_STRIPE
#undef STRIPE
#undef K
#undef JOIN
#undef JOIN_

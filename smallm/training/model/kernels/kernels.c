/* CPU kernels of a training step: a whole Transformer block, forward and backward, RMSNorm, cross-entropy and Muon's
 * orthogonalisation.
 *
 * compiler.py compiles this file with the machine's C compiler. It includes the headers beside it, from vectors.h to
 * attention.h, and uses the vector extensions of GCC and Clang, and OpenMP. operations.py implements every operation in
 * plain PyTorch as well; the tests compare the two.
 *
 * The matrices of a small model are so small that one library call per product and one pass over memory per norm cost
 * more than the arithmetic. A block is therefore one call: each thread takes chunks of rows through all operations, a
 * chunk and the weights stay in the cache, and the backward pass recomputes what is cheaper to compute than to store.
 *
 * Compiled with -DBF16, all matrix products, those of attention included, round their operands to bf16 and sum in float32.
 * All other operations, such as norms and softmax, stay in float32.
 *
 * All tensors are float32 (targets int64), contiguous, row-major. Chunks are scheduled dynamically, because other
 * programs may slow some cores. Sums over chunks are accumulated in `slots`, two per thread (one for one thread), each
 * with a fixed range of rows. Results therefore depend on the number of threads (the order of summation), but not on the
 * scheduling.
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

#include "vectors.h"
#include "products.h"
#include "norms.h"
#include "attention.h"

/* ---- RMSNorm ---- */

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

/* dy, x (N, C) -> dx (N, C), dgain (C). Workspace: parts (slots, C), or dgain if there is one slot. */
void rms_norm_backward(const float *dy, const float *x, const float *gain, float *dx, float *dgain, float *parts,
                       int64_t N, int64_t C, float eps, int threads)
{
    const int64_t slots = slots_of(threads);
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

/* Copies the lower half of the symmetric x (n, n), in blocks of PANEL columns, to the upper half. */
static void mirror(int64_t n, float *x)
{
    for (int64_t j = 0; j < n; j += W)
        for (int64_t i = j / PANEL * PANEL + PANEL; i < n; i += W) transpose(x + i * n + j, n, W, x + j * n + i, n);
}

/* c (n, n) = a (n, K) b (K, n) for a symmetric c: computes the lower half and mirrors it. a in rows, b in panels. */
static void multiply_symmetric(int64_t n, int64_t K, const operand *a, const operand *b, float *c)
{
    const int64_t pairs = K / PAIR;
    for (int64_t j = 0; j < n; j += PANEL)
        product(n - j, PANEL, pairs, a + j * pairs, pairs, 1, b + j * pairs, pairs, c + j * n + j, n, 0);
    mirror(n, c);
}

/* For each (a, b, c) of the coefficients (steps, 3): x = a x + (b S + c S S) x with S = x x', in place. x holds n matrices
 * (rows, columns) of norm about 1 with rows <= columns, both multiples of PANEL. In bf16, x and S are rounded in the sums
 * too: as parts of a polynomial of one matrix most errors cancel. */
void orthogonalise(float *x, const float *coefficients, int64_t n, int64_t rows, int64_t columns, int64_t steps,
                   int threads)
{
    const int64_t square = rows * rows, whole = rows * columns;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t m = 0; m < n; m++) {
        float *gram = scratch((size_t)(4 * square + 2 * whole)), *polynomial = gram + square, *z = x + m * whole;
        operand *left = (operand *)(polynomial + square), *right = left + square + whole;
        for (int64_t s = 0; s < steps; s++) {
            const float *abc = coefficients + 3 * s;
            pack_transposed(z, columns, columns, 0, rows / PANEL, right);
            multiply_symmetric(rows, columns, in_rows(z, whole, left), right, gram);
            multiply_symmetric(rows, rows, in_rows(gram, square, left), in_panels(gram, rows, rows, right), polynomial);
            for (int64_t i = 0; i < square; i += W)
                store(polynomial + i, all(abc[1]) * rounded(load(gram + i)) + all(abc[2]) * load(polynomial + i));
            in_panels(z, rows, columns, right);
            for (int64_t i = 0; i < whole; i += W) store(z + i, all(abc[0]) * rounded(load(z + i)));
            multiply(rows, columns, rows, in_rows(polynomial, square, left), right, z, 1);
        }
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

/* Rows per chunk: a chunk and a panel of weights should fit in the cache. */
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
        __builtin_prefetch(x + 4 * I + i), __builtin_prefetch(x + 5 * I + i); /* of the row after the next one */
        vec gate = load(x + i), up = load(x + I + i), d = load(dy + i);
        vec sigmoid = all(1.0f) / (all(1.0f) + exponential(-gate)), silu = gate * sigmoid;
        store(y + i, silu * up);
        store(dx + i, d * up * (sigmoid + silu * (all(1.0f) - sigmoid)));
        store(dx + I + i, d * silu);
    }
}

/* Forward pass of a block: x (N, C) -> y (N, C). Stores for the backward pass: qkv (N, R), attended (N, H D), lse
 * (B, H, T), middle (N, C), inner (N, 2 I). Workspace: packed (as large as all weights). */
void block(const float *x, float *y, float *qkv, float *attended, float *lse, float *middle, float *inner, operand *packed,
           const float *ln_1, const float *w_attn, const float *q_gain, const float *k_gain, const float *w_proj,
           const float *ln_2, const float *w_fc, const float *w_down, const float *cos, const float *sin, int64_t B,
           int64_t T, int64_t C, int64_t H, int64_t G, int64_t D, int64_t I, int64_t window, int64_t seed, float eps,
           float dropout, int threads)
{
    const Block b = {B, T, C, H, G, D, I, ln_1, w_attn, q_gain, k_gain, w_proj, ln_2, w_fc, w_down, cos, sin, eps, dropout,
                     (uint32_t)seed};
    const Attention a = {qkv, q_gain, k_gain, cos, sin, attended, lse, NULL, NULL, B, T, H, G, window, eps};
    const int64_t N = B * T, R = packed_width(&b), HD = H * D;
    operand *p_attn = packed, *p_proj = p_attn + R * C / PAIR, *p_fc = p_proj + C * HD / PAIR;
    operand *p_down = p_fc + 2 * I * C / PAIR;
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to, chunk = chunk_size(N);
        thread_range(R / PANEL, &from, &to), pack_transposed(w_attn, C, C, from, to, p_attn);
        thread_range(C / PANEL, &from, &to), pack_transposed(w_proj, HD, HD, from, to, p_proj);
        thread_range(2 * I / PANEL, &from, &to), pack_transposed(w_fc, C, C, from, to, p_fc);
        thread_range(C / PANEL, &from, &to), pack_transposed(w_down, I, I, from, to, p_down);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < N; first += chunk) {
            int64_t n = N - first < chunk ? N - first : chunk;
            float *h = scratch((size_t)(2 * chunk * C));
            operand *rows = (operand *)(h + chunk * C);
            for (int64_t i = 0; i < n; i++) norm(x + (first + i) * C, ln_1, h + i * C, C, eps);
            multiply(n, R, C, in_rows(h, n * C, rows), p_attn, qkv + first * R, 0);
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
            float *h = scratch((size_t)(chunk * (2 * C + HD + 2 * I))), *act = h + chunk * C;
            operand *rows = (operand *)(act + chunk * I); /* for C, H D or I columns */
            multiply(n, C, HD, in_rows(attended + first * HD, n * HD, rows), p_proj, h, 0);
            for (int64_t i = 0; i < n; i++) {
                int64_t at = (first + i) * C;
                drop(&b, 0, first + i, h + i * C);
                for (int64_t c = 0; c < C; c += W) store(middle + at + c, load(x + at + c) + load(h + i * C + c));
                norm(middle + at, ln_2, h + i * C, C, eps);
            }
            multiply(n, 2 * I, C, in_rows(h, n * C, rows), p_fc, inner + first * 2 * I, 0);
            for (int64_t i = 0; i < n; i++) swiglu(inner + (first + i) * 2 * I, act + i * I, I);
            multiply(n, C, I, in_rows(act, n * I, rows), p_down, h, 0);
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
 * Workspace: dattended (N, H D), dqkv (N, R), packed (as large as all weights), parts (slots, as large as all
 * weights), or gradients if there is one slot. */
void block_backward(const float *dy, const float *x, const float *qkv, float *attended, float *lse, const float *middle,
                    const float *inner, float *dx, float *gradients, float *dattended, float *dqkv, operand *packed,
                    float *parts, const float *ln_1, const float *w_attn, const float *q_gain, const float *k_gain,
                    const float *w_proj, const float *ln_2, const float *w_fc, const float *w_down, const float *cos,
                    const float *sin, int64_t B, int64_t T, int64_t C, int64_t H, int64_t G, int64_t D, int64_t I,
                    int64_t window, int64_t seed, float eps, float dropout, int threads)
{
    const Block b = {B, T, C, H, G, D, I, ln_1, w_attn, q_gain, k_gain, w_proj, ln_2, w_fc, w_down, cos, sin, eps, dropout,
                     (uint32_t)seed};
    const Attention a = {qkv, q_gain, k_gain, cos, sin, attended, lse, dattended, dqkv, B, T, H, G, window, eps};
    const int64_t N = B * T, R = packed_width(&b), HD = H * D, weights = 2 * C + 2 * D + (R + HD + 3 * I) * C;
    const int64_t slots = slots_of(threads), chunk = 8 * ROWS;
    operand *p_attn = packed, *p_proj = p_attn + R * C / PAIR, *p_fc = p_proj + C * HD / PAIR;
    operand *p_down = p_fc + 2 * I * C / PAIR;
    /* Offsets of the weight gradients in each part. */
    const int64_t at_attn = C, at_q_gain = at_attn + R * C, at_k_gain = at_q_gain + D, at_proj = at_k_gain + D;
    const int64_t at_ln_2 = at_proj + C * HD, at_fc = at_ln_2 + C, at_down = at_fc + 2 * I * C;
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to;
        thread_range(C / PANEL, &from, &to), pack(w_attn, C, R, from, to, p_attn), pack(w_fc, C, 2 * I, from, to, p_fc);
        thread_range(HD / PANEL, &from, &to), pack(w_proj, HD, C, from, to, p_proj);
        thread_range(I / PANEL, &from, &to), pack(w_down, I, C, from, to, p_down);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t slot = 0; slot < slots; slot++) {
            float *part = memset(parts + slot * weights, 0, (size_t)weights * sizeof(float));
            slot_range(slot, slots, N, &from, &to);
            for (int64_t first = from; first < to; first += chunk) {
                int64_t n = to - first < chunk ? to - first : chunk;
                float *d = scratch((size_t)(chunk * (6 * C + HD + 9 * I))), *h = d + chunk * C, *dh = h + chunk * C;
                float *dact = dh + chunk * C, *act = dact + chunk * I, *dinner = act + chunk * I;
                operand *rows = (operand *)(dinner + 2 * chunk * I), *left = rows + chunk * (C + 2 * I);
                operand *right = left + chunk * (C + 2 * I); /* for C, H D or I columns */
                memcpy(d, dy + first * C, (size_t)(n * C) * sizeof(float));
                for (int64_t i = 0; i < n; i++) drop(&b, 1, first + i, d + i * C);
                multiply(n, I, C, in_rows(d, n * C, rows), p_down, dact, 0);
                for (int64_t i = 0; i < n; i++) {
                    swiglu_backward(dact + i * I, inner + (first + i) * 2 * I, dinner + i * 2 * I, act + i * I, I);
                    norm(middle + (first + i) * C, ln_2, h + i * C, C, eps);
                }
                add_outer(C, I, n, in_panels(d, n, C, left), in_panels(act, n, I, right), part + at_down);
                add_outer(2 * I, C, n, in_panels(dinner, n, 2 * I, left), in_panels(h, n, C, right), part + at_fc);
                multiply(n, C, 2 * I, in_rows(dinner, n * 2 * I, rows), p_fc, dh, 0);
                for (int64_t i = 0; i < n; i++) {
                    int64_t at = (first + i) * C;
                    norm_backward(dh + i * C, middle + at, ln_2, dy + at, dx + at, part + at_ln_2, C, eps);
                    memcpy(d + i * C, dx + at, (size_t)C * sizeof(float));
                    drop(&b, 0, first + i, d + i * C);
                }
                multiply(n, HD, C, in_rows(d, n * C, rows), p_proj, dattended + first * HD, 0);
                const operand *y = in_panels(attended + first * HD, n, HD, right);
                add_outer(C, HD, n, in_panels(d, n, C, left), y, part + at_proj);
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
                const float *d = dqkv + first * R;
                float *h = scratch((size_t)(chunk * (3 * C + 2 * R))), *dh = h + chunk * C;
                operand *rows = (operand *)(dh + chunk * C), *left = rows + chunk * R, *right = left + chunk * R;
                for (int64_t i = 0; i < n; i++) norm(x + (first + i) * C, ln_1, h + i * C, C, eps);
                add_outer(R, C, n, in_panels(d, n, R, left), in_panels(h, n, C, right), part + at_attn);
                multiply(n, C, R, in_rows(d, n * R, rows), p_attn, dh, 0);
                for (int64_t i = 0; i < n; i++) {
                    int64_t at = (first + i) * C;
                    norm_backward(dh + i * C, x + at, ln_1, dx + at, dx + at, part, C, eps);
                }
            }
        }
        sum_slots(parts, weights, slots, gradients);
    }
}

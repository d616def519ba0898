/* Causal self-attention over the last `window` positions; queries and keys are normed, then rotated.
 *
 * A task takes QUERIES queries of a head at a time. The scores are computed transposed, (keys, QUERIES): each lane of a
 * vector belongs to one query, so that maxima and sums over keys need no operation across lanes, and two rows of
 * probabilities combine into the pairs along the keys that the products with values and keys sum over.
 */

typedef struct {
    const float *qkv, *q_gain, *k_gain, *cos, *sin; /* (B, T, H + 2 G, D), (D), (D), (T, D), first half of sin negated */
    float *y, *lse;                                 /* (B, T, H, D), (B, H, T): log-sum-exp of the scores */
    const float *dy;                                /* (B, T, H, D) */
    float *dqkv;                                    /* (B, T, H + 2 G, D) */
    int64_t B, T, H, G, window;
    float eps;
} Attention;

enum { QUERIES = 32 };      /* queries processed together; a multiple of PANEL */
enum { KEYS = 32 * PAIR }; /* keys processed together in the backward pass; the scores of a block stay in the cache */

/* Rows of keys and values in memory: zeros fill the last block. */
INLINE int64_t padded_keys(int64_t T) { return (T + QUERIES - 1) / QUERIES * QUERIES; }

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

/* The key/value head g of sequence b: keys (T, D), normed and rotated, and values (T, D), both filled up with zeros. */
INLINE void load_keys(const Attention *s, const int64_t D, const float *x, int64_t g, float *k, float *v)
{
    const int64_t T = s->T, row = (s->H + 2 * s->G) * D, rest = (padded_keys(T) - T) * D;
    for (int64_t t = 0; t < T; t++) {
        norm_rotate(s, D, x + t * row + (s->H + g) * D, s->k_gain, t, 1.0f, k + t * D);
        memcpy(v + t * D, x + t * row + (s->H + s->G + g) * D, (size_t)D * sizeof(float));
    }
    memset(k + T * D, 0, (size_t)rest * sizeof(float));
    memset(v + T * D, 0, (size_t)rest * sizeof(float));
}

/* Whether a block of scores with this key needs a mask for some of the queries from `first` on. */
INLINE int needs_mask(int64_t key, int64_t first, int64_t window)
{
    return key > first || key <= first + QUERIES - 1 - window;
}

/* The queries that see the key: those from the key on, within the window. */
INLINE ivec sees(ivec query, int64_t key, int64_t window)
{
    return (query >= (int32_t)key) & (query < (int32_t)(key + window));
}

INLINE ivec lanes_from(int64_t first)
{
    ivec lanes;
    for (int i = 0; i < W; i++) lanes[i] = (int32_t)(first + i);
    return lanes;
}

/* scores (keys, QUERIES) of the keys from `low` on and the queries from `first` on -> p, the numerators of the softmax
 * in panels of pairs of keys; for each query, top (QUERIES) = highest score and total (QUERIES) = denominator. */
static void softmax(float *scores, int64_t keys, int64_t low, int64_t first, int64_t window, operand *p, float *top,
                    float *total)
{
    for (int64_t q = 0; q < QUERIES; q += W) {
        const ivec query = lanes_from(first + q);
        vec highest = all(-INFINITY), sum = {0};
        for (int64_t j = 0; j < keys; j++) {
            float *at = scores + j * QUERIES + q;
            if (needs_mask(low + j, first, window))
                store(at, choose(sees(query, low + j, window), load(at), all(-INFINITY)));
            highest = larger(load(at), highest);
        }
        for (int64_t j = 0; j < keys; j += PAIR) {
            vec e[PAIR];
            for (int64_t i = 0; i < PAIR; i++) {
                e[i] = exponential(load(scores + (j + i) * QUERIES + q) - highest);
                sum += e[i];
            }
            store_operands(p + j / PAIR * QUERIES + q, combine(e));
        }
        store(top + q, highest);
        store(total + q, sum);
    }
}

/* Task (b, g): the query heads of sequence b that share the key/value head g. Callers pass the common D as a constant,
 * so that the compiler specialises the function. */
INLINE void attend(const Attention *s, int64_t task, const int64_t D)
{
    const int64_t T = s->T, H = s->H, G = s->G, b = task / G, g = task % G, words = D / PAIR;
    const int64_t row = (H + 2 * G) * D, group = H / G, P = padded_keys(T), E = padded(D);
    const float factor = 1.0f / sqrtf((float)D), *x = s->qkv + b * T * row;
    float *k = scratch((size_t)(3 * P * D + P * E + QUERIES * (2 * P + 2 * D + E + 2) + PANEL)), *v = k + P * D;
    float *q = v + P * D, *scores = q + QUERIES * D, *o = scores + QUERIES * P, *top = o + QUERIES * E;
    float *total = top + QUERIES;
    operand *keys_memory = (operand *)(total + QUERIES), *values = keys_memory + P * D, *queries = values + P * E;
    operand *p = queries + QUERIES * D;

    load_keys(s, D, x, g, k, v);
    const operand *keys = in_rows(k, P * D, keys_memory);
    pack(v, D, P, 0, E / PANEL, values);
    for (int64_t h = g * group; h < (g + 1) * group; h++)
        for (int64_t first = 0; first < T; first += QUERIES) {
            int64_t n = T - first < QUERIES ? T - first : QUERIES, low = first_key(s, first);
            int64_t count = first + QUERIES - low;
            for (int64_t i = 0; i < n; i++)
                norm_rotate(s, D, x + (first + i) * row + h * D, s->q_gain, first + i, factor, q + i * D);
            memset(q + n * D, 0, (size_t)((QUERIES - n) * D) * sizeof(float));
            pack_transposed(q, D, D, 0, QUERIES / PANEL, queries);
            product(count, QUERIES, words, keys + low * words, words, 1, queries, words, scores, QUERIES, 0);
            softmax(scores, count, low, first, s->window, p, top, total);
            product(n, E, count / PAIR, p, 1, QUERIES, values + low / PAIR * PANEL, P / PAIR, o, E, 0);
            for (int64_t i = 0; i < n; i++) {
                float *out = s->y + ((b * T + first + i) * H + h) * D, inverse = 1.0f / total[i];
                for (int64_t d = 0; d < D; d += W) store(out + d, load(o + i * E + d) * all(inverse));
                s->lse[(b * H + h) * T + first + i] = top[i] + logf(total[i]);
            }
        }
}

/* scores and dscores (keys, QUERIES), the latter the gradient of the probabilities -> p and ds, the probabilities and the
 * gradient of the scores, in rows, and ds also in panels of pairs of keys. For each query, lse (QUERIES) is the
 * log-sum-exp of the scores, and means (QUERIES) the mean of dscores, weighted with the probabilities. */
static void softmax_backward(const float *scores, const float *dscores, int64_t keys, int64_t low, int64_t first,
                             int64_t window, const float *lse, const float *means, operand *p, operand *ds,
                             operand *ds_panels)
{
    for (int64_t q = 0; q < QUERIES; q += W) {
        const ivec query = lanes_from(first + q);
        const vec shift = load(lse + q), mean = load(means + q);
        for (int64_t j = 0; j < keys; j += PAIR) {
            vec two[PAIR];
            for (int64_t i = 0; i < PAIR; i++) {
                const int64_t at = (j + i) * QUERIES + q;
                vec e = exponential(load(scores + at) - shift);
                if (needs_mask(low + j + i, first, window)) e = choose(sees(query, low + j + i, window), e, all(0.0f));
                two[i] = e * (load(dscores + at) - mean);
                store_row(p + at / PAIR, e);
                store_row(ds + at / PAIR, two[i]);
            }
            store_operands(ds_panels + j / PAIR * QUERIES + q, combine(two));
        }
    }
}

INLINE void attend_backward(const Attention *s, int64_t task, const int64_t D, float *dq_gain, float *dk_gain)
{
    const int64_t T = s->T, H = s->H, G = s->G, b = task / G, g = task % G, words = D / PAIR;
    const int64_t row = (H + 2 * G) * D, group = H / G, P = padded_keys(T), E = padded(D);
    const float factor = 1.0f / sqrtf((float)D), *x = s->qkv + b * T * row;
    float *dx = s->dqkv + b * T * row;
    float *k = scratch((size_t)(4 * P * D + 3 * P * E + QUERIES * (5 * KEYS + 4 * D + 3 * E + 2) + PANEL));
    float *v = k + P * D, *dk = v + P * D, *dv = dk + P * E, *q = dv + P * E, *dout = q + QUERIES * D;
    float *dq = dout + QUERIES * D, *lse = dq + QUERIES * E, *means = lse + QUERIES, *scores = means + QUERIES;
    float *dscores = scores + QUERIES * KEYS;
    operand *p = (operand *)(dscores + QUERIES * KEYS), *ds = p + QUERIES * KEYS, *ds_panels = ds + QUERIES * KEYS;
    operand *q_columns = ds_panels + QUERIES * KEYS, *dout_columns = q_columns + QUERIES * D;
    operand *q_panels = dout_columns + QUERIES * D, *dout_panels = q_panels + QUERIES * E;
    operand *k_panels = dout_panels + QUERIES * E, *k_memory = k_panels + P * E, *v_memory = k_memory + P * D;

    load_keys(s, D, x, g, k, v);
    const operand *k_rows = in_rows(k, P * D, k_memory), *v_rows = in_rows(v, P * D, v_memory);
    pack(k, D, P, 0, E / PANEL, k_panels);
    memset(dk, 0, (size_t)(2 * P * E) * sizeof(float)); /* and dv, which follows dk */
    for (int64_t h = g * group; h < (g + 1) * group; h++)
        for (int64_t first = 0; first < T; first += QUERIES) {
            int64_t n = T - first < QUERIES ? T - first : QUERIES, low = first_key(s, first);
            for (int64_t i = 0; i < n; i++) {
                const int64_t at = ((b * T + first + i) * H + h) * D;
                norm_rotate(s, D, x + (first + i) * row + h * D, s->q_gain, first + i, factor, q + i * D);
                memcpy(dout + i * D, s->dy + at, (size_t)D * sizeof(float));
                vec dot = {0};
                for (int64_t d = 0; d < D; d += W) dot += load(s->y + at + d) * load(s->dy + at + d);
                means[i] = sum(dot);
                lse[i] = s->lse[(b * H + h) * T + first + i];
            }
            for (int64_t i = n; i < QUERIES; i++) means[i] = 0, lse[i] = INFINITY; /* probability 0 */
            memset(q + n * D, 0, (size_t)((QUERIES - n) * D) * sizeof(float));
            memset(dout + n * D, 0, (size_t)((QUERIES - n) * D) * sizeof(float));
            pack_transposed(q, D, D, 0, QUERIES / PANEL, q_columns);
            pack_transposed(dout, D, D, 0, QUERIES / PANEL, dout_columns);
            pack(q, D, QUERIES, 0, E / PANEL, q_panels);
            pack(dout, D, QUERIES, 0, E / PANEL, dout_panels);
            for (int64_t key = low; key < first + QUERIES; key += KEYS) {
                const int64_t m = first + QUERIES - key < KEYS ? first + QUERIES - key : KEYS, pairs = QUERIES / PAIR;
                product(m, QUERIES, words, k_rows + key * words, words, 1, q_columns, words, scores, QUERIES, 0);
                product(m, QUERIES, words, v_rows + key * words, words, 1, dout_columns, words, dscores, QUERIES, 0);
                softmax_backward(scores, dscores, m, key, first, s->window, lse, means, p, ds, ds_panels);
                product(m, E, pairs, p, pairs, 1, dout_panels, pairs, dv + key * E, E, 1);
                product(m, E, pairs, ds, pairs, 1, q_panels, pairs, dk + key * E, E, 1);
                const operand *right = k_panels + key / PAIR * PANEL;
                product(n, E, m / PAIR, ds_panels, 1, QUERIES, right, P / PAIR, dq, E, key > low);
            }
            for (int64_t i = 0; i < n; i++)
                norm_rotate_backward(s, D, x + (first + i) * row + h * D, s->q_gain, first + i, factor, dq + i * E,
                          dx + (first + i) * row + h * D, dq_gain);
        }
    for (int64_t t = 0; t < T; t++) {
        int64_t key = t * row + (H + g) * D;
        norm_rotate_backward(s, D, x + key, s->k_gain, t, 1.0f, dk + t * E, dx + key, dk_gain);
        memcpy(dx + key + G * D, dv + t * E, (size_t)D * sizeof(float));
    }
}

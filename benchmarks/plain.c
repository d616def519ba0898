/* A plain C program in the manner of llama2.c: straightforward loops over weights that plain.py writes, and the sampler of
   SAMPLING.md with temperature and top_k. plain.py compares smallm.c with it. Not for use: nothing is checked.

   plain WEIGHTS --seed TEXT --max-length N (ids) --temperature X --top-k K --rng-seed N */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LAYERS = 64 };

typedef struct {
    const float *ln_1, *qk_gain, *qkv, *attention_out, *ln_2, *gate_up, *down; /* matrices: (outputs, inputs) */
} layer;

typedef struct {
    int32_t n_layer, n_head, n_kv_head, E, width, V, T, I, has_table;
    const float *embedding, *table, *ln_f, *cos, *sin;
    layer layers[MAX_LAYERS];
    const char *tokens; /* (V, 5): length and bytes */
    float *keys, *values, *x, *normed, *qkv, *mixed, *scores, *hidden, *logits;
} model;

static float *room(int n) { return calloc((size_t)n, sizeof(float)); }

static const float *take(FILE *file, int rows, int columns)
{
    float *data = room(rows * columns);
    if (fread(data, sizeof *data, (size_t)rows * columns, file) != (size_t)rows * columns) exit(1);
    return data;
}

static void open_model(model *m, const char *path)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL || fread(m, sizeof(int32_t), 9, file) != 9) exit(1);
    int heads = m->n_head + 2 * m->n_kv_head, E = m->E, half = m->width / 2, cache = m->n_kv_head * m->width;
    m->embedding = take(file, m->V, E);
    m->table = m->has_table ? take(file, m->V, heads * m->width) : NULL;
    for (int i = 0; i < m->n_layer; i++) {
        layer *l = &m->layers[i];
        if (i > 0 || !m->has_table) {
            l->ln_1 = take(file, 1, E);
            l->qk_gain = take(file, m->n_head + m->n_kv_head, m->width);
            l->qkv = take(file, heads * m->width, E);
        }
        l->attention_out = take(file, E, m->n_head * m->width);
        l->ln_2 = take(file, 1, E);
        l->gate_up = take(file, 2 * m->I, E);
        l->down = take(file, E, m->I);
    }
    m->ln_f = take(file, 1, E);
    m->cos = take(file, m->T, half), m->sin = take(file, m->T, half);
    char *tokens = calloc((size_t)m->V, 5);
    if (fread(tokens, 5, (size_t)m->V, file) != (size_t)m->V) exit(1);
    m->tokens = tokens;
    fclose(file);
    m->keys = room(m->n_layer * m->T * cache), m->values = room(m->n_layer * m->T * cache);
    m->x = room(E), m->normed = room(E), m->qkv = room(heads * m->width), m->mixed = room(m->n_head * m->width);
    m->scores = room(m->T), m->hidden = room(2 * m->I), m->logits = room(m->V);
}

static void matmul(float *y, const float *x, const float *w, int outputs, int inputs)
{
    for (int n = 0; n < outputs; n++) {
        float sum = 0;
        for (int k = 0; k < inputs; k++) sum += w[(size_t)n * inputs + k] * x[k];
        y[n] = sum;
    }
}

static void norm(float *y, const float *x, const float *gain, int length)
{
    float sum = 0;
    for (int i = 0; i < length; i++) sum += x[i] * x[i];
    float scale = 1 / sqrtf(sum / length + 1e-6f);
    for (int i = 0; i < length; i++) y[i] = x[i] * scale * gain[i];
}

static void attend(model *m, int i, int position)
{
    int width = m->width, half = width / 2, group = m->n_head / m->n_kv_head, stride = m->n_kv_head * width;
    float *keys = m->keys + (size_t)i * m->T * stride, *values = m->values + (size_t)i * m->T * stride;
    const float *cosine = m->cos + position * half, *sine = m->sin + position * half;
    for (int h = 0; h < m->n_head + m->n_kv_head; h++)
        for (int j = 0; j < half; j++) {
            float *q = m->qkv + h * width, low = q[j], high = q[half + j];
            q[j] = low * cosine[j] - high * sine[j];
            q[half + j] = high * cosine[j] + low * sine[j];
        }
    memcpy(keys + position * stride, m->qkv + m->n_head * width, stride * sizeof(float));
    memcpy(values + position * stride, m->qkv + m->n_head * width + stride, stride * sizeof(float));
    memset(m->mixed, 0, m->n_head * width * sizeof(float));
    for (int h = 0; h < m->n_head; h++) {
        float *q = m->qkv + h * width, *y = m->mixed + h * width, largest = -INFINITY, sum = 0;
        for (int t = 0; t <= position; t++) {
            const float *key = keys + t * stride + h / group * width;
            float score = 0;
            for (int j = 0; j < width; j++) score += q[j] * key[j];
            m->scores[t] = score;
            if (score > largest) largest = score;
        }
        for (int t = 0; t <= position; t++) sum += m->scores[t] = expf(m->scores[t] - largest);
        for (int t = 0; t <= position; t++) {
            const float *value = values + t * stride + h / group * width;
            float weight = m->scores[t] / sum;
            for (int j = 0; j < width; j++) y[j] += weight * value[j];
        }
    }
}

static void forward(model *m, int id, int position)
{
    int heads = m->n_head + 2 * m->n_kv_head, E = m->E, width = m->width;
    memcpy(m->x, m->embedding + (size_t)id * E, E * sizeof(float));
    for (int i = 0; i < m->n_layer; i++) {
        const layer *l = &m->layers[i];
        if (i == 0 && m->has_table) {
            memcpy(m->qkv, m->table + (size_t)id * heads * width, heads * width * sizeof(float));
        } else {
            norm(m->normed, m->x, l->ln_1, E);
            matmul(m->qkv, m->normed, l->qkv, heads * width, E);
            for (int h = 0; h < m->n_head + m->n_kv_head; h++)
                norm(m->qkv + h * width, m->qkv + h * width, l->qk_gain + h * width, width);
        }
        attend(m, i, position);
        matmul(m->normed, m->mixed, l->attention_out, E, m->n_head * width);
        for (int j = 0; j < E; j++) m->x[j] += m->normed[j];
        norm(m->normed, m->x, l->ln_2, E);
        matmul(m->hidden, m->normed, l->gate_up, 2 * m->I, E);
        for (int j = 0; j < m->I; j++) m->hidden[j] *= m->hidden[m->I + j] / (1 + expf(-m->hidden[j]));
        matmul(m->normed, m->hidden, l->down, E, m->I);
        for (int j = 0; j < E; j++) m->x[j] += m->normed[j];
    }
    norm(m->normed, m->x, m->ln_f, E);
    matmul(m->logits, m->normed, m->embedding, m->V, E);
}

static uint32_t mix(uint32_t x)
{
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

static int sample(const model *m, double u, double temperature, int top_k, float *sorted, double *sums)
{
    double sum = 0;
    int id = 0;
    memcpy(sorted, m->logits, m->V * sizeof(float));
    qsort(sorted, m->V, sizeof(float), descending);
    float least = top_k > 0 && top_k < m->V ? sorted[top_k - 1] : sorted[m->V - 1];
    for (int i = 0; i < m->V; i++)
        sums[i] = sum += m->logits[i] >= least ? exp(((double)m->logits[i] - sorted[0]) / temperature) : 0;
    while (sums[id] <= u * sum) id++;
    return id;
}

int main(int argc, char **argv)
{
    static model m;
    const char *seed = "";
    int length = 100, top_k = 0, position = 0;
    double temperature = 1;
    uint32_t rng_seed = 0;
    for (int i = 2; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--seed") == 0) seed = argv[i + 1];
        if (strcmp(argv[i], "--max-length") == 0) length = atoi(argv[i + 1]);
        if (strcmp(argv[i], "--top-k") == 0) top_k = atoi(argv[i + 1]);
        if (strcmp(argv[i], "--temperature") == 0) temperature = atof(argv[i + 1]);
        if (strcmp(argv[i], "--rng-seed") == 0) rng_seed = (uint32_t)strtoul(argv[i + 1], NULL, 10);
    }
    open_model(&m, argv[1]);
    float *sorted = room(m.V);
    double *sums = calloc((size_t)m.V, sizeof *sums);
    uint32_t key = mix(mix(rng_seed));
    fputs(seed, stdout);
    while (*seed) {
        int id = (uint8_t)*seed, bytes = 1;
        for (int i = 256; i < m.V; i++) /* the longest token */
            if (m.tokens[5 * i] > bytes && strncmp(m.tokens + 5 * i + 1, seed, (size_t)m.tokens[5 * i]) == 0)
                id = i, bytes = m.tokens[5 * i];
        forward(&m, id, position++);
        seed += bytes;
    }
    for (uint32_t i = 1; i <= (uint32_t)length && position < m.T; i++) {
        int id = sample(&m, (mix(key + i * 0x9E3779B9u) >> 8) / 16777216.0, temperature, top_k, sorted, sums);
        fwrite(m.tokens + 5 * id + 1, 1, (size_t)m.tokens[5 * id], stdout);
        fflush(stdout);
        forward(&m, id, position++);
    }
    return 0;
}

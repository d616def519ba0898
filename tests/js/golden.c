/* The golden vectors of draws, ids and allowed ids, computed by functions inside smallm.c: golden.mjs calls them. */
#include "../../smallm/embed/c/smallm.c"

SMALLM_API uint32_t golden_draw(uint32_t rng_seed, uint32_t stream_number, uint32_t i)
{
    return draw(rng_key(rng_seed, stream_number), i);
}

/* Twelve ids by the golden logits: multiples of 2^-21 from -4 to 4. */
SMALLM_API void golden_ids(double temperature, double top_k, double top_p, double min_p, double penalty, int32_t *ids)
{
    enum { V = 256, WINDOW = 8 };
    static float logits[V], processed[V];
    static uint64_t keys[V], order[V], spare[V];
    static double weights[V];
    static smallm_model model;
    static smallm_context context;
    smallm_options options;
    model.vocab_size = V;
    context.model = &model, context.processed = processed, context.weights = weights;
    context.sort_keys = keys, context.order = order, context.spare = spare;
    smallm_default_options(NULL, &options, sizeof options);
    options.temperature = temperature, options.top_k = (int64_t)top_k, options.top_p = top_p, options.min_p = min_p;
    smallm_reseed(&context, 7, 0);
    for (size_t step = 0; step < 12; step++) {
        size_t seen = step < WINDOW ? step : WINDOW;
        for (uint32_t id = 0; id < V; id++)
            logits[id] = (float)((mix(256 * (uint32_t)(step % 3) + id) >> 8) / 2097152.0 - 4);
        apply_repetition_penalty(&context, logits, ids + step - seen, seen, penalty);
        ids[step] = sample(&context, u_of(context.state.key, ++context.state.draws), &options);
    }
}

/* Whether each id may follow the bytes `after`; returns the number of ids, or 0 for a mistake. allowed: NULL = all. */
SMALLM_API int golden_allowed(const char *tokens, const char *allowed, const char *banned, const uint8_t *after,
                              size_t count, bool *found)
{
    static token read[64];
    static smallm_model model;
    static smallm_context context;
    sequence_state *d = &context.state;
    memset(&context, 0, sizeof context);
    model.tokens = read, context.model = &model;
    if (!read_tokens(span_of(tokens, strlen(tokens)), read, &model.token_count)) return 0;
    model.vocab_size = 256 + (int32_t)model.token_count;
    d->options.allowed = allowed, d->options.banned = banned;
    if (prepare_allowed(&context, d) != SMALLM_OK) return 0;
    free(d->allowed);
    d->allowed = found;
    memcpy(d->decoder.bytes, after, count);
    d->decoder.length = (int)count;
    find_allowed(&model, d);
    free(d->characters);
    return model.vocab_size;
}

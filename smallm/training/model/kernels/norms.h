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

/* Passes over maps that the library makes slowly or one by one: batch norm by batch statistics with the activation
 * behind it, forward and backward, and the sum and mask of gradients. Maps lie channels last.
 *
 * A map is a matrix of `rows` pixels by `channels`, without gaps. Several pixels are taken as one long row, so that few
 * channels fill the vector unit too; coefficients are repeated to that length. Sums are kept in float for BLOCK long
 * rows, then in double. Every thread takes an equal part of the long rows, small maps are one thread's: results depend
 * on the number of threads, never on their timing. Values are float or bfloat16, all coefficients float.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NONE, RELU, RELU6, H_SWISH, SILU }; /* activations */
enum { FLOAT, BFLOAT16 };            /* types of maps */
enum { LANES = 16, SHORTEST = 64, BLOCK = 64, GRAIN = 32768 };

#define INLINE static inline __attribute__((always_inline))

/* Threads that are worth waking for so many numbers, each of which costs `weight` operations. */
static int worth(int threads, int64_t size, int64_t weight) {
    int64_t most = 1 + size * weight / GRAIN;
    return most < threads ? (int)most : threads;
}

/* Values: `type` and `kind` are constants wherever these are inlined. */

INLINE float load(int type, const void *map, int64_t at) {
    if (type == FLOAT) return ((const float *)map)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)map)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void store(int type, void *map, int64_t at, float value) { /* to nearest, ties to even; NaN stays NaN */
    if (type == FLOAT) {
        ((float *)map)[at] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ((uint16_t *)map)[at] = value == value ? (uint16_t)rounded : (uint16_t)0x7fc0;
}

INLINE float sigmoid(float z) { /* 1 / (1 + 2^t), t the nearest integer plus the rest; error below 3e-7 */
    uint32_t bits, sign;
    memcpy(&bits, &z, sizeof z);
    sign = bits & 0x80000000, bits &= 0x7fffffff;
    bits = (bits < 0x42ae0000 ? bits : 0x42ae0000) | sign; /* |z| at most 87; of a NaN, too, which z itself passes on */
    memcpy(&z, &bits, sizeof z);
    float t = z * -1.44269504f, near = (t + 12582912.0f) - 12582912.0f, rest = t - near, power, two;
    bits = (uint32_t)((int32_t)near + 127) << 23;
    memcpy(&two, &bits, sizeof two);
    power = 1.5403530e-4f; /* the series of 2^rest */
    power = power * rest + 1.3333558e-3f;
    power = power * rest + 9.6181291e-3f;
    power = power * rest + 5.5504109e-2f;
    power = power * rest + 2.4022651e-1f;
    power = power * rest + 6.9314718e-1f;
    power = power * rest + 1;
    return 1 / (1 + two * power);
}

INLINE float activated(int kind, float z) { /* NaN passes through */
    if (kind == RELU) return z < 0 ? 0 : z;
    if (kind == RELU6) return z < 0 ? 0 : z > 6 ? 6 : z;
    if (kind == H_SWISH) {
        float gate = z + 3;
        gate = gate < 0 ? 0 : gate > 6 ? 6 : gate;
        return z * gate * (1.0f / 6);
    }
    if (kind == SILU) return z * sigmoid(z);
    return z;
}

INLINE float slope(int kind, float z) {
    if (kind == RELU) return z > 0 ? 1 : 0;
    if (kind == RELU6) return z > 0 && z < 6 ? 1 : 0;
    if (kind == H_SWISH) return z <= -3 ? 0 : z < 3 ? z * (1.0f / 3) + 0.5f : 1;
    if (kind == SILU) {
        float gate = sigmoid(z);
        return gate * (1 + z * (1 - gate));
    }
    return 1;
}

/* One call: maps, coefficients of `period` values, sums of 2 * channels doubles for each thread. */
typedef struct {
    const void *x, *dy;
    void *out;
    float *a, *b, *mean, *u, *v;
    double *sums;
    int64_t period, channels, count;
} Work;

INLINE void settle(double *total, float *part, const Work *w) { /* float sums of long rows into those of channels */
    for (int64_t start = 0; start < w->period; start += w->channels)
        for (int64_t c = 0; c < w->channels; c++) total[c] += part[start + c];
    memset(part, 0, sizeof(float) * w->period);
}

/* What a thread does with its long rows, first <= row < last. */

INLINE void moments(int type, const Work *w, int64_t first, int64_t last, double *total, float *part) {
    float *square = part + w->period, *pivot = w->mean;
    for (int64_t row = first; row < last; row++) { /* sums of x - pivot and of its square */
        int64_t at = row * w->period;
#pragma omp simd
        for (int64_t p = 0; p < w->period; p++) {
            float d = load(type, w->x, at + p) - pivot[p];
            part[p] += d;
            square[p] += d * d;
        }
        if ((row - first) % BLOCK == BLOCK - 1 || row == last - 1) {
            settle(total, part, w);
            settle(total + w->channels, square, w);
        }
    }
}

INLINE void apply(int type, int kind, const Work *w, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) { /* activation(a x + b) */
        int64_t at = row * w->period;
#pragma omp simd
        for (int64_t p = 0; p < w->period; p++)
            store(type, w->out, at + p, activated(kind, load(type, w->x, at + p) * w->a[p] + w->b[p]));
    }
}

INLINE void reduce(int type, int kind, const Work *w, int64_t first, int64_t last, double *total, float *part) {
    float *cross = part + w->period;
    for (int64_t row = first; row < last; row++) { /* sums of g = dy * slope and of g (x - mean) */
        int64_t at = row * w->period;
#pragma omp simd
        for (int64_t p = 0; p < w->period; p++) {
            float x = load(type, w->x, at + p);
            float g = load(type, w->dy, at + p) * slope(kind, x * w->a[p] + w->b[p]);
            part[p] += g;
            cross[p] += g * (x - w->mean[p]);
        }
        if ((row - first) % BLOCK == BLOCK - 1 || row == last - 1) {
            settle(total, part, w);
            settle(total + w->channels, cross, w);
        }
    }
}

INLINE void retract(int type, int kind, const Work *w, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) { /* a g + u x + v */
        int64_t at = row * w->period;
#pragma omp simd
        for (int64_t p = 0; p < w->period; p++) {
            float x = load(type, w->x, at + p);
            float g = load(type, w->dy, at + p) * slope(kind, x * w->a[p] + w->b[p]);
            store(type, w->out, at + p, w->a[p] * g + w->u[p] * x + w->v[p]);
        }
    }
}

/* Choose the constants, share out the rows. */

#define FOR_KINDS(type, call)                        \
    switch (kind) {                                  \
        case NONE: call(type, NONE); break;          \
        case RELU: call(type, RELU); break;          \
        case RELU6: call(type, RELU6); break;        \
        case H_SWISH: call(type, H_SWISH); break;    \
        default: call(type, SILU);                   \
    }
#define FOR_ALL(call) \
    if (type == FLOAT) { FOR_KINDS(FLOAT, call) } else { FOR_KINDS(BFLOAT16, call) }

typedef enum { MOMENTS, APPLY, REDUCE, RETRACT } Pass;

static void pass(Pass what, int type, int kind, const Work *w, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        int64_t first = w->count * t / threads, last = w->count * (t + 1) / threads;
        double *total = w->sums + 2 * w->channels * t;
        float *part = what == MOMENTS || what == REDUCE ? calloc(2 * w->period, sizeof(float)) : NULL;
#define CALL_APPLY(type, kind) apply(type, kind, w, first, last)
#define CALL_REDUCE(type, kind) reduce(type, kind, w, first, last, total, part)
#define CALL_RETRACT(type, kind) retract(type, kind, w, first, last)
        if (what == MOMENTS) {
            if (type == FLOAT) moments(FLOAT, w, first, last, total, part);
            else moments(BFLOAT16, w, first, last, total, part);
        } else if (what == APPLY) {
            FOR_ALL(CALL_APPLY)
        } else if (what == REDUCE) {
            FOR_ALL(CALL_REDUCE)
        } else {
            FOR_ALL(CALL_RETRACT)
        }
        free(part);
    }
}

static int64_t period_of(int64_t rows, int64_t channels) { /* a multiple of the vector's length, where rows allow it */
    int64_t pixels = 1;
    while (((pixels * channels) % LANES || pixels * channels < SHORTEST) && rows % (2 * pixels) == 0) pixels *= 2;
    return pixels * channels;
}

static void repeat(float *values, const Work *w) { /* the first `channels` to the whole period */
    for (int64_t p = w->channels; p < w->period; p++) values[p] = values[p - w->channels];
}

static int begin(Work *w, int64_t rows, int64_t channels, int threads) {
    w->channels = channels;
    w->period = period_of(rows, channels);
    w->count = rows * channels / w->period;
    w->sums = calloc(2 * channels * threads, sizeof(double));
    w->a = malloc(5 * w->period * sizeof(float));
    w->b = w->a + w->period, w->mean = w->b + w->period, w->u = w->mean + w->period, w->v = w->u + w->period;
    return w->sums != NULL && w->a != NULL;
}

static void end(Work *w, int threads) { /* without threads: only free */
    for (int t = 1; t < threads; t++)
        for (int64_t i = 0; i < 2 * w->channels; i++) w->sums[i] += w->sums[2 * w->channels * t + i];
    if (threads == 0) {
        free(w->sums);
        free(w->a);
    }
}

/* y = activation(scale (x - mean) / sqrt(var + eps) + shift); mean and (biased) var are written. 0, or 1 if memory lacks. */
int norm_forward(int type, int kind, const void *x, const float *scale, const float *shift, double eps, int64_t rows,
                 int64_t channels, void *y, float *mean, float *var, int threads) {
    Work w = {.x = x, .out = y};
    threads = worth(threads, rows * channels, 1);
    if (!begin(&w, rows, channels, threads)) return 1;
    for (int64_t c = 0; c < channels; c++) w.mean[c] = load(type, x, c); /* the first pixel as pivot */
    repeat(w.mean, &w);
    pass(MOMENTS, type, kind, &w, threads);
    end(&w, threads);
    for (int64_t c = 0; c < channels; c++) {
        double shifted = w.sums[c] / rows, spread = w.sums[channels + c] / rows - shifted * shifted;
        double centre = w.mean[c] + shifted;
        spread = spread < 0 ? 0 : spread;
        double factor = scale[c] / sqrt(spread + eps);
        mean[c] = centre, var[c] = spread;
        w.a[c] = factor, w.b[c] = shift[c] - centre * factor;
    }
    repeat(w.a, &w), repeat(w.b, &w);
    pass(APPLY, type, kind, &w, threads);
    end(&w, 0);
    return 0;
}

/* Gradients with respect to x, scale and shift, given that of y. */
int norm_backward(int type, int kind, const void *dy, const void *x, const float *scale, const float *shift, double eps,
                  const float *mean, const float *var, int64_t rows, int64_t channels, void *dx, float *dscale,
                  float *dshift, int threads) {
    Work w = {.x = x, .dy = dy, .out = dx};
    threads = worth(threads, rows * channels, 1);
    if (!begin(&w, rows, channels, threads)) return 1;
    for (int64_t c = 0; c < channels; c++) {
        double factor = scale[c] / sqrt(var[c] + eps);
        w.a[c] = factor, w.b[c] = shift[c] - mean[c] * factor, w.mean[c] = mean[c];
    }
    repeat(w.a, &w), repeat(w.b, &w), repeat(w.mean, &w);
    pass(REDUCE, type, kind, &w, threads);
    end(&w, threads);
    for (int64_t c = 0; c < channels; c++) {
        double precision = 1 / (var[c] + eps), plain = w.sums[c], cross = w.sums[channels + c];
        dshift[c] = plain, dscale[c] = cross * sqrt(precision);
        w.u[c] = -w.a[c] * cross * precision / rows;
        w.v[c] = -w.a[c] * plain / rows - w.u[c] * mean[c];
    }
    repeat(w.u, &w), repeat(w.v, &w);
    pass(RETRACT, type, kind, &w, threads);
    end(&w, 0);
    return 0;
}

/* gradient = gradient + side where out is positive, else 0; `side` and `out` may be NULL: nothing added, no mask. */

INLINE void join(int type, int adds, int masks, void *gradient, const void *side, const void *out, int64_t first,
                 int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; i++) {
        float value = load(type, gradient, i);
        if (adds) value += load(type, side, i);
        if (masks) value = load(type, out, i) > 0 ? value : 0;
        store(type, gradient, i, value);
    }
}

void mask_gradient(int type, void *gradient, const void *side, const void *out, int64_t size, int threads) {
    threads = worth(threads, size, 1);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        int64_t first = size * t / threads, last = size * (t + 1) / threads;
#define JOIN(type, adds, masks) join(type, adds, masks, gradient, side, out, first, last)
#define FOR_TYPE(type)                              \
        if (side && out) JOIN(type, 1, 1);          \
        else if (side) JOIN(type, 1, 0);            \
        else JOIN(type, 0, 1);
        if (type == FLOAT) { FOR_TYPE(FLOAT) } else { FOR_TYPE(BFLOAT16) }
    }
}

/* Gradient of a depthwise convolution with respect to its filters: for every tap the sum over output pixels of
 * dy * x at that tap. `dw` is channels by taps; sums are float within an image, double over images.
 */

INLINE void gather(int type, const void *dy, const void *x, int64_t image, int64_t channels, int64_t height,
                   int64_t width, int64_t out_height, int64_t out_width, int kernel, int stride, float *taps) {
    int64_t margin = kernel / 2;
    for (int64_t row = 0; row < out_height; row++)
        for (int64_t column = 0; column < out_width; column++) {
            int64_t from = ((image * out_height + row) * out_width + column) * channels;
            for (int i = 0; i < kernel; i++) {
                int64_t y = row * stride + i - margin;
                if (y < 0 || y >= height) continue;
                for (int j = 0; j < kernel; j++) {
                    int64_t z = column * stride + j - margin;
                    if (z < 0 || z >= width) continue;
                    int64_t at = ((image * height + y) * width + z) * channels;
                    float *tap = taps + (i * kernel + j) * channels;
#pragma omp simd
                    for (int64_t c = 0; c < channels; c++) tap[c] += load(type, dy, from + c) * load(type, x, at + c);
                }
            }
        }
}

int depthwise_filter_gradient(int type, const void *dy, const void *x, int64_t images, int64_t channels, int64_t height,
                              int64_t width, int64_t out_height, int64_t out_width, int kernel, int stride, float *dw,
                              int threads) {
    int64_t size = (int64_t)kernel * kernel * channels;
    threads = worth(threads, images * out_height * out_width * channels, (int64_t)kernel * kernel);
    double *sums = calloc(size * threads, sizeof(double));
    float *parts = malloc(size * threads * sizeof(float));
    int failed = sums == NULL || parts == NULL;
    if (!failed) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) {
            float *taps = parts + size * t;
            double *total = sums + size * t;
            for (int64_t image = images * t / threads; image < images * (t + 1) / threads; image++) {
                memset(taps, 0, size * sizeof(float)); /* float within an image, double over images */
                if (type == FLOAT)
                    gather(FLOAT, dy, x, image, channels, height, width, out_height, out_width, kernel, stride, taps);
                else
                    gather(BFLOAT16, dy, x, image, channels, height, width, out_height, out_width, kernel, stride, taps);
                for (int64_t i = 0; i < size; i++) total[i] += taps[i];
            }
        }
        for (int64_t c = 0; c < channels; c++)
            for (int64_t tap = 0; tap < (int64_t)kernel * kernel; tap++) {
                double sum = 0;
                for (int t = 0; t < threads; t++) sum += sums[size * t + tap * channels + c];
                dw[c * kernel * kernel + tap] = sum;
            }
    }
    free(sums);
    free(parts);
    return failed;
}

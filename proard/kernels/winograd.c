/* 3x3 convolutions of stride 1 by Winograd's method F(4x4, 3x3): 36 products for 16 outputs instead of 144.
 *
 * Maps lie channels last, and channels are multiples of LANES. A map is cut into tiles of 4x4 outputs, each of which
 * reads 6x6 inputs. Threads take chunks of tiles, small enough for the cache: inputs are transformed into 36 matrices
 * (tiles, in), each is multiplied by the matrix (in, out) of transformed filters, and the products are transformed back
 * together with the elementwise work that follows. Every tile is computed by the same operations in the same order, so
 * that results depend neither on the number of threads nor on the other images of the batch.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 8, PANEL = 2 * LANES, ROWS = 6, SIDE = 4, REACH = 6, PLANES = REACH * REACH };
enum { CHUNK = 1 << 17, FEWEST = 4 * ROWS, GAP = 16 }; /* floats in a thread's scratch; tiles; floats between planes */

#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));

INLINE vector load(const float *at) { return *(const vector *)at; }
INLINE void store(float *at, vector value) { *(vector *)at = value; }
INLINE vector keep(mask where, vector value) { return (vector)(where & (mask)value); }

/* B' d: six values of an input's row or column. */
INLINE void input_line(const vector d[REACH], vector out[REACH]) {
    vector p = d[4] - 4 * d[2], q = d[3] - 4 * d[1], u = d[4] - d[2], v = 2 * (d[3] - d[1]);
    out[0] = 4 * d[0] - 5 * d[2] + d[4];
    out[1] = p + q;
    out[2] = p - q;
    out[3] = u + v;
    out[4] = u - v;
    out[5] = 4 * d[1] - 5 * d[3] + d[5];
}

/* A' m: four outputs of six products. */
INLINE void output_line(const vector m[REACH], vector out[SIDE]) {
    vector p = m[1] + m[2], q = m[1] - m[2], u = m[3] + m[4], v = m[3] - m[4];
    out[0] = m[0] + p + u;
    out[1] = q + 2 * v;
    out[2] = p + 4 * u;
    out[3] = q + 8 * v + m[5];
}

/* G g: six values of a filter's row or column. */
INLINE void filter_line(const vector g[3], vector out[REACH]) {
    vector even = g[0] + g[2], far = g[0] * (1.0f / 24) + g[2] * (1.0f / 6), middle = g[1] * (1.0f / 12);
    out[0] = g[0] * 0.25f;
    out[1] = (even + g[1]) * (-1.0f / 6);
    out[2] = (even - g[1]) * (-1.0f / 6);
    out[3] = far + middle;
    out[4] = far - middle;
    out[5] = g[2];
}

/* Columns of the panel that begins at output channel `o`. */
INLINE int64_t wide(int64_t out, int64_t o) { return out - o < PANEL ? LANES : PANEL; }

/* Transformed filters: 36 planes of panels of up to 16 output channels, each a matrix (in, panel).
 * `strides` are those of `weight` by output channel, input channel, row and column. */
void winograd_filters(const float *weight, int64_t out_stride, int64_t in_stride, int64_t row, int64_t column,
                      int64_t in, int64_t out, float *filters) {
    for (int64_t o = 0; o < out; o += LANES) {
        int64_t first = o / PANEL * PANEL, columns = wide(out, first);
        for (int64_t i = 0; i < in; i++) {
            vector g[3][3], half[3][REACH], t[REACH], line[3];
            for (int r = 0; r < 3; r++)
                for (int s = 0; s < 3; s++)
                    for (int lane = 0; lane < LANES; lane++)
                        g[r][s][lane] = weight[(o + lane) * out_stride + i * in_stride + r * row + s * column];
            for (int r = 0; r < 3; r++) filter_line(g[r], half[r]);
            for (int s = 0; s < REACH; s++) {
                for (int r = 0; r < 3; r++) line[r] = half[r][s];
                filter_line(line, t);
                for (int r = 0; r < REACH; r++)
                    store(filters + ((r * REACH + s) * out + first) * in + i * columns + o - first, t[r]);
            }
        }
    }
}

/* One call. */
typedef struct {
    const float *x, *filters, *bias, *side, *before;
    float *y;
    int64_t height, width, in, out, down, across, plane_in, plane_out;
    int relu;
} Call;

/* Where a tile lies. */
typedef struct {
    int64_t image, row, column;
} Place;

INLINE Place place(const Call *c, int64_t tile) {
    int64_t per_image = c->down * c->across, within = tile % per_image;
    return (Place){tile / per_image, within / c->across * SIDE, within % c->across * SIDE};
}

static void transform_input(const Call *c, int64_t tile, float *to) {
    Place at = place(c, tile);
    const float *image = c->x + at.image * c->height * c->width * c->in;
    for (int64_t k = 0; k < c->in; k += LANES) {
        vector half[REACH][REACH], t[REACH], line[REACH];
        for (int s = 0; s < REACH; s++) {
            int64_t column = at.column + s - 1;
            for (int r = 0; r < REACH; r++) {
                int64_t row = at.row + r - 1;
                int inside = row >= 0 && row < c->height && column >= 0 && column < c->width;
                line[r] = inside ? load(image + (row * c->width + column) * c->in + k) : (vector){0};
            }
            input_line(line, half[s]);
        }
        for (int r = 0; r < REACH; r++) {
            for (int s = 0; s < REACH; s++) line[s] = half[s][r];
            input_line(line, t);
            for (int s = 0; s < REACH; s++) store(to + (r * REACH + s) * c->plane_in + k, t[s]);
        }
    }
}

static void transform_output(const Call *c, int64_t tile, const float *from) {
    Place at = place(c, tile);
    int64_t rows = c->height - at.row, columns = c->width - at.column;
    for (int64_t k = 0; k < c->out; k += LANES) {
        vector half[REACH][SIDE], t[SIDE], line[REACH], bias = c->bias ? load(c->bias + k) : (vector){0};
        for (int s = 0; s < REACH; s++) {
            for (int r = 0; r < REACH; r++) line[r] = load(from + (r * REACH + s) * c->plane_out + k);
            output_line(line, half[s]);
        }
        for (int r = 0; r < SIDE && r < rows; r++) {
            for (int s = 0; s < REACH; s++) line[s] = half[s][r];
            output_line(line, t);
            int64_t pixel = (at.image * c->height + at.row + r) * c->width + at.column;
            for (int s = 0; s < SIDE && s < columns; s++) {
                int64_t to = (pixel + s) * c->out + k;
                vector value = t[s] + bias;
                if (c->side) value += load(c->side + to);
                if (c->relu) value = keep(~(value < 0), value); /* NaN passes through */
                if (c->before) value = keep(load(c->before + to) > 0, value);
                store(c->y + to, value);
            }
        }
    }
}

/* (ROWS, in) times (in, panel); `vectors` is a constant wherever this is inlined. */
INLINE void multiply(int vectors, const float *a, const float *b, float *to, int64_t in, int64_t out) {
    vector sums[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = (vector){0};
    for (int64_t i = 0; i < in; i++) {
        vector line[2];
        for (int v = 0; v < vectors; v++) line[v] = load(b + (i * vectors + v) * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < vectors; v++) sums[r][v] += a[r * in + i] * line[v];
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++) store(to + r * out + v * LANES, sums[r][v]);
}

static void multiply_planes(const Call *c, int64_t rows, const float *transformed, float *products) {
    for (int64_t plane = 0; plane < PLANES; plane++)
        for (int64_t o = 0; o < c->out; o += PANEL) {
            const float *panel = c->filters + (plane * c->out + o) * c->in, *a = transformed + plane * c->plane_in;
            float *to = products + plane * c->plane_out + o;
            if (wide(c->out, o) == PANEL)
                for (int64_t r = 0; r < rows; r += ROWS)
                    multiply(2, a + r * c->in, panel, to + r * c->out, c->in, c->out);
            else
                for (int64_t r = 0; r < rows; r += ROWS)
                    multiply(1, a + r * c->in, panel, to + r * c->out, c->in, c->out);
        }
}

INLINE int64_t divided(int64_t number, int64_t by) { return (number + by - 1) / by; }

/* `count` tiles from `first` on. */
static void convolve_tiles(const Call *c, int64_t first, int64_t count, float *transformed, float *products) {
    int64_t whole = divided(count, ROWS) * ROWS;
    for (int64_t t = 0; t < count; t++) transform_input(c, first + t, transformed + t * c->in);
    for (int64_t plane = 0; plane < PLANES; plane++) /* rows that are multiplied and not read */
        memset(transformed + plane * c->plane_in + count * c->in, 0, (whole - count) * c->in * sizeof(float));
    multiply_planes(c, whole, transformed, products);
    for (int64_t t = 0; t < count; t++) transform_output(c, first + t, products + t * c->out);
}

/* Convolve `images` maps (height, width, in), padded by one; add `bias` by channel and the map `side`; apply the ReLU;
 * set to zero where `before` is not positive. The last four are left out where they are null or 0.
 * Returns whether memory was missing. */
int winograd_convolve(const float *x, const float *filters, const float *bias, const float *side, const float *before,
                      float *y, int64_t images, int64_t height, int64_t width, int64_t in, int64_t out, int relu,
                      int threads) {
    int64_t down = divided(height, SIDE), across = divided(width, SIDE), tiles = images * down * across;
    if (!tiles) return 0;
    int64_t most = CHUNK / (PLANES * (in + out)); /* tiles in a chunk */
    most = most < FEWEST ? FEWEST : most;
    int64_t chunks = divided(divided(tiles, most), threads) * threads; /* an equal number for every thread */
    int64_t rows = divided(divided(tiles, chunks), ROWS) * ROWS;
    int64_t plane_in = rows * in + GAP, plane_out = rows * out + GAP; /* planes do not share cache sets */
    Call call = {x, filters, bias, side, before, y, height, width, in, out, down, across, plane_in, plane_out, relu};
    int64_t scratch = PLANES * (plane_in + plane_out);
    float *memory = malloc(threads * scratch * sizeof(float));
    if (!memory) return 1;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *transformed = memory + t * scratch, *products = transformed + PLANES * plane_in;
        for (int64_t first = t * rows; first < tiles; first += threads * rows)
            convolve_tiles(&call, first, tiles - first < rows ? tiles - first : rows, transformed, products);
    }
    free(memory);
    return 0;
}

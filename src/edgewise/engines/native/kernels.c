/* The kernels, compiled once per instruction set: EW_KERNELS names the table, EW_LANES the floats in one of its registers,
   EW_TILE the most rows of a tile.

   Everything but the integer dot products is written with the compiler's vector types. A row's arithmetic is the same
   sequence whatever rows share its tile, which is what makes results repeat bit by bit. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "native.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * EW_LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * EW_LANES), aligned(4)));

INLINE vec splat(float x) { return x - (vec){}; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
INLINE vec smaller(vec a, vec b) { return choose(a < b, a, b); }

INLINE float sum_of(vec v) {
    float s[EW_LANES];
    store(s, v);
    for (int width = EW_LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}

INLINE float largest_of(vec v) {
    float s[EW_LANES], largest = -INFINITY;
    store(s, v);
    for (int i = 0; i < EW_LANES; i++) largest = s[i] > largest ? s[i] : largest;
    return largest;
}

/* e^x for -87 <= x <= 88, relative error below 2e-7: x = n ln 2 + r, a polynomial in r, n into the exponent. */
INLINE vec exponential(vec x) {
    x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
    vec n = x * 1.44269504f;
    ivec whole = __builtin_convertvector(n + choose(n < 0.0f, splat(-0.5f), splat(0.5f)), ivec);
    n = __builtin_convertvector(whole, vec);
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((whole + 127) << 23);
}

INLINE vec hyperbolic_tangent(vec x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

/* ---- integer dot products: what an instruction set must bring ----
   EW_LANES sums; each step adds the products of 4 inputs with as many outputs' codes. */

#if defined(__AVX512VNNI__)

typedef __m512i dots;
INLINE dots no_dots(void) { return _mm512_setzero_si512(); }
INLINE __m512i inputs4(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}
INLINE dots add4(dots a, const uint8_t *w, int half, const int8_t *x) {
    __m512i v = _mm512_loadu_si512(w);
    v = _mm512_and_si512(half ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
    return _mm512_dpbusd_epi32(a, v, inputs4(x));
}
INLINE dots add8(dots a, const uint8_t *w, const int8_t *x) { return _mm512_dpbusd_epi32(a, _mm512_loadu_si512(w), inputs4(x)); }
INLINE vec as_floats(dots a) { return (vec)_mm512_cvtepi32_ps(a); }

#elif defined(__AVXVNNI__)

typedef __m256i dots;
INLINE dots no_dots(void) { return _mm256_setzero_si256(); }
INLINE __m256i inputs4(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}
INLINE dots add4(dots a, const uint8_t *w, int half, const int8_t *x) {
    __m256i v = _mm256_loadu_si256((const __m256i *)w);
    v = _mm256_and_si256(half ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
    return _mm256_dpbusd_avx_epi32(a, v, inputs4(x));
}
INLINE dots add8(dots a, const uint8_t *w, const int8_t *x) {
    return _mm256_dpbusd_avx_epi32(a, _mm256_loadu_si256((const __m256i *)w), inputs4(x));
}
INLINE vec as_floats(dots a) { return (vec)_mm256_cvtepi32_ps(a); }

#elif defined(__AVX2__)

/* Products of codes below 16 with int8 fit int16 for a whole block of 32, so they are widened once. A code of 8 bits is two
   of 4. */
typedef struct {
    __m256i low, high;
} dots;
INLINE dots no_dots(void) { return (dots){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE __m256i products4(const uint8_t *w, int half, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    __m256i v = _mm256_loadu_si256((const __m256i *)w);
    v = _mm256_and_si256(half ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
    return _mm256_maddubs_epi16(v, _mm256_set1_epi32(four));
}
INLINE dots add4(dots a, const uint8_t *w, int half, const int8_t *x) {
    a.low = _mm256_add_epi16(a.low, products4(w, half, x));
    return a;
}
INLINE dots add8(dots a, const uint8_t *w, const int8_t *x) {
    a.low = _mm256_add_epi16(a.low, products4(w, 0, x));
    a.high = _mm256_add_epi16(a.high, products4(w, 1, x));
    return a;
}
INLINE vec as_floats(dots a) {
    const __m256i one = _mm256_set1_epi16(1);
    __m256i high = _mm256_slli_epi32(_mm256_madd_epi16(a.high, one), 4);
    return (vec)_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(a.low, one), high));
}

#else
#error "no integer dot product for this instruction set"
#endif

/* ---- matrices ---- */

/* EW_LANES scales or minima, from number `at` on. */
INLINE vec factors_at(const void *from, int bytes, size_t at) {
    const uint16_t *halves = (const uint16_t *)from + at;
    if (bytes == 4) return load((const float *)from + at);
#if EW_LANES == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
#else
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves));
#endif
}

/* EW_LANES outputs, from `lane` of group g on, for the `rows` rows of one tile. */
INLINE void outputs(const ew_matrix *w, int g, int lane, const int rows, const int bits, const int block, const int8_t *codes,
                    const ew_factor *factors, float *out, int out_stride) {
    const int blocks = w->inputs / EW_BLOCK, bytes = EW_BLOCK * EW_COLUMNS * bits / 8, parts = EW_BLOCK / block;
    const uint8_t *q = w->codes + (size_t)g * blocks * bytes + 4 * lane;
    size_t at = (size_t)g * blocks * parts * EW_COLUMNS + lane; /* in scales and minima */
    vec total[EW_TILE];
    UNROLL for (int m = 0; m < rows; m++) total[m] = splat(0);
    for (int b = 0; b < blocks; b++, q += bytes, codes += rows * EW_BLOCK, factors += rows) {
        UNROLL for (int part = 0; part < parts; part++, at += EW_COLUMNS) {
            dots a[EW_TILE];
            UNROLL for (int m = 0; m < rows; m++) a[m] = no_dots();
            UNROLL for (int i = 0; i < 8 / parts; i++) {
                const int four = part * 8 / parts + i; /* which 4 of the block's 32 inputs */
                UNROLL for (int m = 0; m < rows; m++) {
                    const int8_t *x = codes + m * EW_BLOCK + 4 * four;
                    a[m] = bits == 4 ? add4(a[m], q + 64 * (four / 2), four % 2, x) : add8(a[m], q + 64 * four, x);
                }
            }
            const vec scales = factors_at(w->scales, w->factor_bytes, at);
            const vec minima = w->minima ? factors_at(w->minima, w->factor_bytes, at) : scales * -(float)(1 << (bits - 1));
            UNROLL for (int m = 0; m < rows; m++) {
                total[m] += as_floats(a[m]) * factors[m].scale * scales;
                total[m] += minima * (parts == 1 ? factors[m].sum : factors[m].half[part]);
            }
        }
    }
    UNROLL for (int m = 0; m < rows; m++) store(out + (size_t)m * out_stride, total[m]);
}

INLINE void groups_of(const ew_matrix *w, int first, int count, const int rows, const int8_t *codes, const ew_factor *factors,
                      float *out, int out_stride) {
#define EACH(BITS, BLOCK) \
    for (int g = 0; g < count; g++) \
        for (int lane = 0; lane < EW_COLUMNS; lane += EW_LANES) \
            outputs(w, first + g, lane, rows, BITS, BLOCK, codes, factors, out + g * EW_COLUMNS + lane, out_stride)
    if (w->bits == 4 && w->block == 32) EACH(4, 32);
    else if (w->bits == 4) EACH(4, 16);
    else if (w->block == 32) EACH(8, 32);
    else EACH(8, 16);
#undef EACH
}

/* out [rows][count * 16] for groups first .. first + count - 1; the activations are those of one tile. */
static void matmul(const ew_matrix *w, int first, int count, int rows, const int8_t *codes, const ew_factor *factors,
                   float *out, int out_stride) {
#define CASE(ROWS) \
    case ROWS: groups_of(w, first, count, ROWS, codes, factors, out, out_stride); break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4)
#if EW_TILE > 4
        CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

/* Round row `row` of a tile of `rows` rows to int8, 32 inputs at a time: code = round(x * 127 / largest). */
static void quantize(const float *x, int inputs, int rows, int row, int8_t *codes, ew_factor *factors) {
    for (int b = 0; b < inputs / EW_BLOCK; b++, x += EW_BLOCK) {
        vec sizes = splat(0);
        for (int i = 0; i < EW_BLOCK; i += EW_LANES) sizes = larger(sizes, larger(load(x + i), -load(x + i)));
        const float largest = largest_of(sizes), scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
        int8_t *to = codes + ((size_t)b * rows + row) * EW_BLOCK;
        int sums[2] = {0, 0};
        for (int i = 0; i < EW_BLOCK; i += EW_LANES) {
            vec v = load(x + i) * inverse;
            ivec whole = __builtin_convertvector(v + choose(v < 0.0f, splat(-0.5f), splat(0.5f)), ivec);
            for (int n = 0; n < EW_LANES; n++) sums[i / 16] += whole[n], to[i + n] = (int8_t)whole[n];
        }
        factors[(size_t)b * rows + row] =
            (ew_factor){scale, scale * (sums[0] + sums[1]), {scale * sums[0], scale * sums[1]}};
    }
}

/* ---- rows ---- */

/* out = x / root mean square * weight; sizes are multiples of 16. */
static void norm(const float *x, const float *weight, float eps, int size, float *out) {
    vec squares = splat(0);
    for (int i = 0; i < size; i += EW_LANES) squares += load(x + i) * load(x + i);
    const float factor = 1 / sqrtf(sum_of(squares) / size + eps);
    for (int i = 0; i < size; i += EW_LANES) store(out + i, load(x + i) * factor * load(weight + i));
}

static void gate(const float *gate, const float *up, int gelu, int size, float *out) {
    for (int i = 0; i < size; i += EW_LANES) {
        vec g = load(gate + i);
        vec activated = gelu ? 0.5f * g * (1.0f + hyperbolic_tangent(0.7978845608f * (g + 0.044715f * g * g * g)))
                             : g / (1.0f + exponential(-g));
        store(out + i, activated * load(up + i));
    }
}

/* ---- attention ---- */

/* Vectors that each query works on at once. Few queries take several, so that enough sums are under way to hide the latency
   of an addition. */
INLINE int at_once(int queries) { return queries <= 3 ? 4 : queries <= 6 ? 2 : 1; }

/* Scaled scores of the queries for the 16 keys of each of `count` groups, lanes `lane` on, unmasked. */
INLINE void score(const ew_attention *a, const float *keys, const int count, const int queries, const float *const *q,
                  float *scores, int stride) {
    vec sum[EW_TILE][4];
    UNROLL for (int i = 0; i < queries; i++) UNROLL for (int g = 0; g < count; g++) sum[i][g] = splat(0);
    for (int d = 0; d < a->head_dim; d++) {
        UNROLL for (int g = 0; g < count; g++) {
            const int at = g * EW_LANES;
            vec k = load(keys + (size_t)(at / 16) * 16 * a->head_dim + 16 * d + at % 16);
            UNROLL for (int i = 0; i < queries; i++) sum[i][g] += k * q[i][d];
        }
    }
    UNROLL for (int i = 0; i < queries; i++)
        UNROLL for (int g = 0; g < count; g++) {
            vec s = sum[i][g] * a->scale;
            if (a->cap > 0) s = a->cap * hyperbolic_tangent(s / a->cap);
            store(scores + (size_t)i * stride + g * EW_LANES, s);
        }
}

/* Numbers at .. at + width * EW_LANES - 1 of the values, weighted; out [queries][head_dim]. */
INLINE void mix(const ew_attention *a, const int queries, const int width, int at, const float *weights, float *out) {
    vec sum[EW_TILE][4];
    UNROLL for (int i = 0; i < queries; i++) UNROLL for (int v = 0; v < width; v++) sum[i][v] = splat(0);
    const float *values = a->values + (size_t)a->first * a->head_dim + at;
    for (int key = 0; key < a->end - a->first; key++, values += a->head_dim) {
        vec part[4];
        UNROLL for (int v = 0; v < width; v++) part[v] = load(values + EW_LANES * v);
        UNROLL for (int i = 0; i < queries; i++) {
            const float p = weights[i * EW_SPAN + key];
            UNROLL for (int v = 0; v < width; v++) sum[i][v] += part[v] * p;
        }
    }
    UNROLL for (int i = 0; i < queries; i++)
        UNROLL for (int v = 0; v < width; v++) store(out + i * a->head_dim + at + EW_LANES * v, sum[i][v]);
}

/* One query's scores of `count` keys from `first` on into weights; keys outside begin .. end - 1 weigh 0. */
INLINE ew_part weigh(float *scores, int first, int count, int begin, int end) {
    ivec lane;
    for (int i = 0; i < EW_LANES; i++) lane[i] = i;
    vec peak = splat(-INFINITY), total = splat(0);
    for (int i = 0; i < count; i += EW_LANES) {
        ivec key = lane + (first + i);
        vec s = choose((key >= begin) & (key < end), load(scores + i), splat(-INFINITY));
        store(scores + i, s);
        peak = larger(peak, s);
    }
    const float highest = largest_of(peak);
    for (int i = 0; i < count; i += EW_LANES) {
        vec s = load(scores + i);
        vec p = choose(s == -INFINITY, splat(0), exponential(s - highest));
        store(scores + i, p);
        total += p;
    }
    return (ew_part){highest, sum_of(total)};
}

INLINE void attend_n(const ew_attention *a, const int queries, const float *const *q, const int *begin, const int *end,
                     ew_part *parts, float *out) {
    float scores[EW_TILE * EW_SPAN];
    const int keys = (a->end - a->first + 15) / 16 * 16, several = at_once(queries), wide = several * EW_LANES;
    const int step = wide > 16 ? wide : 16;
    const float *from = a->keys + (size_t)a->first * a->head_dim;
    int key = 0, at = 0;
    for (; key + step <= keys; key += step)
        for (int part = 0; part < step; part += wide)
            score(a, from + (size_t)key * a->head_dim + part, several, queries, q, scores + key + part, EW_SPAN);
    for (; key < keys; key += EW_LANES)
        score(a, from + (size_t)(key / 16) * 16 * a->head_dim + key % 16, 1, queries, q, scores + key, EW_SPAN);
    for (int i = 0; i < queries; i++) parts[i] = weigh(scores + i * EW_SPAN, a->first, keys, begin[i], end[i]);
    for (; at + wide <= a->head_dim; at += wide) mix(a, queries, several, at, scores, out);
    for (; at < a->head_dim; at += EW_LANES) mix(a, queries, 1, at, scores, out);
}

/* One part of attention: `queries` queries of one kv head, query i over the positions begin[i] .. end[i] - 1 that lie in
   it. parts [queries], out [queries][head_dim]. */
static void attend(const ew_attention *a, int queries, const float *const *q, const int *begin, const int *end,
                   ew_part *parts, float *out) {
#define CASE(N) \
    case N: attend_n(a, N, q, begin, end, parts, out); break;
    switch (queries) {
        CASE(1) CASE(2) CASE(3) CASE(4)
#if EW_TILE > 4
        CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

/* The parts of one query as one; those of span s are parts[s * stride] and mixed[s * stride * head_dim ...]. */
static void combine(int spans, const ew_part *parts, const float *mixed, int stride, int head_dim, float *out) {
    float highest = -INFINITY, total = 0;
    for (int s = 0; s < spans; s++) highest = parts[s * stride].highest > highest ? parts[s * stride].highest : highest;
    for (int i = 0; i < head_dim; i += EW_LANES) store(out + i, splat(0));
    for (int s = 0; s < spans; s++) {
        const float lower = parts[s * stride].highest - highest;
        if (lower == -INFINITY) continue; /* nothing that this query sees: adding zeros could turn a -0 */
        const float share = exponential(splat(lower))[0];
        total += share * parts[s * stride].total;
        for (int i = 0; i < head_dim; i += EW_LANES)
            store(out + i, load(out + i) + share * load(mixed + (size_t)s * stride * head_dim + i));
    }
    for (int i = 0; i < head_dim; i += EW_LANES) store(out + i, load(out + i) / total);
}

const ew_kernels EW_KERNELS = {EW_NAME, EW_TILE, matmul, quantize, norm, gate, attend, combine};

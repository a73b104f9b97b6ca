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
typedef int16_t shorts __attribute__((vector_size(4 * EW_LANES), aligned(2)));
typedef uint8_t bytes __attribute__((vector_size(4 * EW_LANES), aligned(1)));

INLINE vec splat(float x) { return x - (vec){}; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
/* The bits of the magnitudes. As integers they are in the order of the floats, a NaN above all others. */
INLINE ivec magnitudes(const float *p) { return *(const ivec *)p & 0x7fffffff; }

/* larger and smaller give b if one of them is NaN. */
#if EW_LANES == 16
#define AS(v) ((__m512)(v))
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps(AS(a), AS(b)); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps(AS(a), AS(b)); }
INLINE ivec larger_whole(ivec a, ivec b) { return (ivec)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE int32_t largest_whole(ivec v) { return _mm512_reduce_max_epi32((__m512i)v); }
INLINE ivec nearest(vec v) { return (ivec)_mm512_cvtps_epi32(AS(v)); }
INLINE float sum_of(vec v) { return _mm512_reduce_add_ps(AS(v)); }
INLINE float largest_of(vec v) { return _mm512_reduce_max_ps(AS(v)); }
/* 32 floats times `by`, each rounded to the nearest code; they fit. */
INLINE __m256i codes_of(const float *x, float by) {
    return _mm256_set_m128i(_mm512_cvtepi32_epi8((__m512i)nearest(load(x + 16) * by)),
                            _mm512_cvtepi32_epi8((__m512i)nearest(load(x) * by)));
}
INLINE vec halves(const uint16_t *p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
/* v where begin <= lane < end, else -infinity. */
INLINE vec within(vec v, int begin, int end) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 in = _mm512_cmp_epi32_mask(lane, _mm512_set1_epi32(begin), _MM_CMPINT_NLT) &
                         _mm512_cmp_epi32_mask(lane, _mm512_set1_epi32(end), _MM_CMPINT_LT);
    return (vec)_mm512_mask_blend_ps(in, AS(splat(-INFINITY)), AS(v));
}
#else
#define AS(v) ((__m256)(v))
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps(AS(a), AS(b)); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm256_min_ps(AS(a), AS(b)); }
INLINE ivec larger_whole(ivec a, ivec b) { return (ivec)_mm256_max_epi32((__m256i)a, (__m256i)b); }
INLINE int32_t largest_whole(ivec v) {
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    s = _mm_max_epi32(s, _mm_unpackhi_epi64(s, s));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_srli_epi64(s, 32)));
}
INLINE ivec nearest(vec v) { return (ivec)_mm256_cvtps_epi32(AS(v)); }
INLINE float sum_of(vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(AS(v)), _mm256_extractf128_ps(AS(v), 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE float largest_of(vec v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(AS(v)), _mm256_extractf128_ps(AS(v), 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
INLINE __m256i codes_of(const float *x, float by) {
    __m256i words[2];
    for (int i = 0; i < 2; i++)
        words[i] = _mm256_packs_epi32((__m256i)nearest(load(x + 16 * i) * by), (__m256i)nearest(load(x + 16 * i + 8) * by));
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
INLINE vec halves(const uint16_t *p) { return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec within(vec v, int begin, int end) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                                           _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
    return (vec)_mm256_blendv_ps(AS(splat(-INFINITY)), AS(v), _mm256_castsi256_ps(in));
}
#endif

/* e^x for -87 <= x <= 88, relative error below 2e-7: x = n ln 2 + r, a polynomial in r, n into the exponent. Beyond them
   it is that of the nearer one; of NaN it is NaN. */
INLINE vec exponential(vec x) {
    x = smaller(splat(88.0f), larger(splat(-87.0f), x));
    const ivec whole = nearest(x * 1.44269504f);
    const vec n = __builtin_convertvector(whole, vec);
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

INLINE bytes codes_at(const uint8_t *w) { return *(const bytes *)w; }
INLINE bytes halves_at(const uint8_t *w, int high) {
    const bytes both = codes_at(w);
    return (high ? (bytes)((shorts)both >> 4) : both) & 15;
}
INLINE ivec inputs4(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return (ivec){} + four;
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

#if EW_LANES == 16
#define DOT(sums, w, x) ((ivec)_mm512_dpbusd_epi32((__m512i)(sums), (__m512i)(w), (__m512i)(x)))
#else
#define DOT(sums, w, x) ((ivec)_mm256_dpbusd_avx_epi32((__m256i)(sums), (__m256i)(w), (__m256i)(x)))
#endif

typedef ivec dots;
INLINE dots no_dots(void) { return (dots){}; }
INLINE dots add4(dots a, const uint8_t *w, int high, const int8_t *x) { return DOT(a, halves_at(w, high), inputs4(x)); }
INLINE dots add8(dots a, const uint8_t *w, const int8_t *x) { return DOT(a, codes_at(w), inputs4(x)); }
INLINE vec as_floats(dots a) { return __builtin_convertvector(a, vec); }

#elif defined(__AVX2__)

/* Products of codes below 16 with int8 fit int16 for a whole block of 32, so they are widened once. A code of 8 bits is two
   of 4. */
typedef struct {
    shorts low, high;
} dots;
INLINE shorts products4(const uint8_t *w, int high, const int8_t *x) {
    return (shorts)_mm256_maddubs_epi16((__m256i)halves_at(w, high), (__m256i)inputs4(x));
}
INLINE ivec widened(shorts a) { return (ivec)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi16(1)); }
INLINE dots no_dots(void) { return (dots){}; }
INLINE dots add4(dots a, const uint8_t *w, int high, const int8_t *x) { return (dots){a.low + products4(w, high, x), a.high}; }
INLINE dots add8(dots a, const uint8_t *w, const int8_t *x) {
    return (dots){a.low + products4(w, 0, x), a.high + products4(w, 1, x)};
}
INLINE vec as_floats(dots a) { return __builtin_convertvector(widened(a.low) + (widened(a.high) << 4), vec); }

#else
#error "no integer dot product for this instruction set"
#endif

/* CASE(n) for each number of rows, or of queries, that a tile may have. */
#if EW_TILE == 4
#define EACH_SIZE(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#else
#define EACH_SIZE(CASE) \
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif

/* ---- matrices ---- */

/* EW_LANES scales or minima, from number `at` on. */
INLINE vec factors_at(const void *from, int bytes, size_t at) {
    return bytes == 4 ? load((const float *)from + at) : halves((const uint16_t *)from + at);
}

/* Codes are read once a token, faster than memory gives them. The processor itself looks ahead to the end of a page at most;
   asked for AHEAD blocks before their use they come in time (8 to 32 blocks are as good), and NTA keeps them from pushing out
   what is needed again. Behind the last block nothing is there to come, which is no fault. */
#define AHEAD 16
#define LINE 64

/* EW_LANES outputs, from `lane` of group g on, for the `rows` rows of one tile. */
INLINE void outputs(const ew_matrix *w, int g, int lane, const int rows, const int bits, const int block, const int8_t *codes,
                    const ew_factor *factors, float *out, int out_stride) {
    const int blocks = w->inputs / EW_BLOCK, bytes = EW_BLOCK * EW_COLUMNS * bits / 8, parts = EW_BLOCK / block;
    const uint8_t *q = w->codes + (size_t)g * blocks * bytes + 4 * lane;
    size_t at = (size_t)g * blocks * parts * EW_COLUMNS + lane; /* in scales and minima */
    vec total[EW_TILE];
    UNROLL for (int m = 0; m < rows; m++) total[m] = splat(0);
    for (int b = 0; b < blocks; b++, q += bytes, codes += rows * EW_BLOCK, factors += rows) {
        UNROLL for (int i = 0; i < bytes / LINE; i++) _mm_prefetch((const char *)q + AHEAD * bytes + i * LINE, _MM_HINT_NTA);
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

INLINE void outputs_of_groups(const ew_matrix *w, int first, int count, const int rows, const int8_t *codes,
                              const ew_factor *factors, float *out, int out_stride) {
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
    case ROWS: outputs_of_groups(w, first, count, ROWS, codes, factors, out, out_stride); break;
    switch (rows) {
        EACH_SIZE(CASE)
    }
#undef CASE
}

/* The sums of 16 codes and the next 16. */
INLINE void sum_codes(__m256i codes, int *sums) {
    __m256i s = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), codes), _mm256_set1_epi16(1));
    s = _mm256_hadd_epi32(s, s);
    s = _mm256_hadd_epi32(s, s);
    sums[0] = _mm256_extract_epi32(s, 0), sums[1] = _mm256_extract_epi32(s, 4);
}

INLINE float largest_magnitude(const float *x, int count) {
    ivec bits = magnitudes(x);
    UNROLL for (int i = EW_LANES; i < count; i += EW_LANES) bits = larger_whole(bits, magnitudes(x + i));
    const int32_t largest = largest_whole(bits);
    float value;
    memcpy(&value, &largest, 4);
    return value;
}

#define NOTHING 1e-36f /* a block of less rounds to zeros: 127 divided by its largest may be infinite */

/* Round row `row` of a tile of `rows` rows to int8, 32 inputs at a time: code = round(x * 127 / largest). A NaN or an
   infinity cannot be a code: the scale carries it on. */
static void quantize(const float *x, int inputs, int rows, int row, int8_t *codes, ew_factor *factors) {
    codes += row * EW_BLOCK, factors += row;
    for (int b = 0; b < inputs / EW_BLOCK; b++, x += EW_BLOCK, codes += rows * EW_BLOCK, factors += rows) {
        const float largest = largest_magnitude(x, EW_BLOCK), scale = largest / 127;
        const __m256i rounded = codes_of(x, largest > NOTHING ? 127 / largest : 0);
        int sums[2];
        sum_codes(rounded, sums);
        _mm256_storeu_si256((__m256i *)codes, rounded);
        *factors = (ew_factor){scale, scale * (sums[0] + sums[1]), {scale * sums[0], scale * sums[1]}};
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

/* x += scale * part */
static void join(float *x, const float *part, float scale, int size) {
    for (int i = 0; i < size; i += EW_LANES) store(x + i, load(x + i) + scale * load(part + i));
}

/* Element i of the first half turns with element i of the second. */
static void rotate(float *restrict x, const float *restrict cos, const float *restrict sin, int half) {
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

/* To the nearest bfloat16, of two the even one; NaN stays NaN. */
static void shorten(const float *x, int size, uint16_t *out) {
    const uint32_t *bits = (const uint32_t *)x;
    for (int i = 0; i < size; i++) {
        const uint32_t rounded = bits[i] + 0x7fff + (bits[i] >> 16 & 1);
        out[i] = (uint16_t)(x[i] == x[i] ? rounded >> 16 : 0x7fc0);
    }
}

static void gate(const float *gate, const float *up, int gelu, int size, float *out) {
    for (int i = 0; i < size; i += EW_LANES) {
        vec g = load(gate + i);
        vec activated = gelu ? 0.5f * g * (1.0f + hyperbolic_tangent(0.7978845608f * (g + 0.044715f * g * g * g)))
                             : g / (1.0f + exponential(-g));
        store(out + i, activated * load(up + i));
    }
}

/* ---- attention ----
   Keys and values are pairs of bfloat16: two dimensions of a key, two positions of a value. An operand is what a query has
   for such a pair. */

#if defined(__AVX512BF16__)

typedef __m512bh pairs;
typedef uint32_t operand;
INLINE pairs load_pairs(const uint16_t *p) { return (pairs)_mm512_loadu_si512(p); }
INLINE vec add_pairs(vec sum, pairs a, operand x) {
    return (vec)_mm512_dpbf16_ps(AS(sum), a, (pairs)_mm512_set1_epi32((int)x));
}
/* EW_LANES numbers as half as many operands; gives them as they are now. */
INLINE vec store_operands(operand *to, vec x) {
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(AS(x));
    _mm256_storeu_si256((__m256i *)to, halves);
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

#else

typedef struct {
    vec first, second;
} pairs;
typedef struct {
    float first, second;
} operand;
INLINE pairs load_pairs(const uint16_t *p) {
    const ivec both = *(const ivec *)p;
    return (pairs){(vec)(both << 16), (vec)(both & (int)0xffff0000)};
}
INLINE vec add_pairs(vec sum, pairs a, operand x) {
    sum += a.first * x.first;
    return sum + a.second * x.second;
}
INLINE vec store_operands(operand *to, vec x) {
    store(&to->first, x);
    return x;
}

#endif

/* Vectors that each query works on at once. Few queries take several, so that enough sums are under way to hide the latency
   of an addition. */
INLINE int at_once(int queries) { return queries <= 3 ? 4 : queries <= 6 ? 2 : 1; }

/* Scores of the queries, q [queries][EW_HEAD_DIM / 2], for `count` vectors of keys, unmasked. */
INLINE void score(const ew_attention *a, const uint16_t *keys, const int count, const int queries, const operand *q,
                  float *scores) {
    vec sum[EW_TILE][4];
    UNROLL for (int i = 0; i < queries; i++) UNROLL for (int g = 0; g < count; g++) sum[i][g] = splat(0);
    for (int d = 0; d < a->head_dim / 2; d++) {
        UNROLL for (int g = 0; g < count; g++) {
            const int at = g * EW_LANES;
            const pairs k = load_pairs(keys + (size_t)(at / 16) * 16 * a->head_dim + 2 * (16 * d + at % 16));
            UNROLL for (int i = 0; i < queries; i++) sum[i][g] = add_pairs(sum[i][g], k, q[i * (EW_HEAD_DIM / 2) + d]);
        }
    }
    UNROLL for (int i = 0; i < queries; i++)
        UNROLL for (int g = 0; g < count; g++) {
            vec s = sum[i][g];
            if (a->cap > 0) s = a->cap * hyperbolic_tangent(s / a->cap);
            store(scores + i * EW_SPAN + g * EW_LANES, s);
        }
}

/* Numbers at .. at + width * EW_LANES - 1 of the values, weighted; weights [queries][EW_SPAN / 2], out [queries][head_dim]. */
INLINE void mix(const ew_attention *a, const int queries, const int width, int at, const operand *weights, float *out) {
    vec sum[EW_TILE][4];
    UNROLL for (int i = 0; i < queries; i++) UNROLL for (int v = 0; v < width; v++) sum[i][v] = splat(0);
    const uint16_t *values = a->values + (size_t)a->first * a->head_dim + 2 * at;
    for (int key = 0; key < (a->end - a->first + 1) / 2; key++, values += 2 * a->head_dim) {
        UNROLL for (int v = 0; v < width; v++) {
            const pairs both = load_pairs(values + 2 * EW_LANES * v);
            UNROLL for (int i = 0; i < queries; i++) sum[i][v] = add_pairs(sum[i][v], both, weights[i * (EW_SPAN / 2) + key]);
        }
    }
    UNROLL for (int i = 0; i < queries; i++)
        UNROLL for (int v = 0; v < width; v++) store(out + i * a->head_dim + at + EW_LANES * v, sum[i][v]);
}

/* One query's weights of `count` keys from `first` on out of their scores; keys outside begin .. end - 1 weigh 0. */
INLINE ew_part weigh(float *scores, int first, int count, int begin, int end, operand *weights) {
    vec peak = splat(-INFINITY), total = splat(0);
    begin -= first, end -= first;
    for (int i = 0; i < count; i += EW_LANES) {
        if (i < begin || i + EW_LANES > end) store(scores + i, within(load(scores + i), begin - i, end - i));
        peak = larger(load(scores + i), peak); /* without NaN, which comes in by its weight */
    }
    const float highest = largest_of(peak);
    for (int i = 0; i < count; i += EW_LANES) {
        vec p = exponential(load(scores + i) - highest);
        if (i < begin || i + EW_LANES > end) p = larger(within(p, begin - i, end - i), splat(0));
        total += store_operands(weights + i / 2, p);
    }
    return (ew_part){highest, sum_of(total)};
}

INLINE void attend_n(const ew_attention *a, const int queries, const float *const *q, const int *begin, const int *end,
                     ew_part *parts, float *out) {
    float scores[EW_TILE * EW_SPAN];
    operand weights[EW_TILE * EW_SPAN / 2], scaled[EW_TILE * EW_HEAD_DIM / 2];
    const int keys = (a->end - a->first + 15) / 16 * 16, several = at_once(queries), wide = several * EW_LANES;
    const int step = wide > 16 ? wide : 16;
    const uint16_t *from = a->keys + (size_t)a->first * a->head_dim;
    int key = 0, at = 0;
    for (int i = 0; i < queries; i++)
        for (int d = 0; d < a->head_dim; d += EW_LANES)
            store_operands(scaled + (i * EW_HEAD_DIM + d) / 2, load(q[i] + d) * a->scale);
    for (; key + step <= keys; key += step)
        for (int part = 0; part < step; part += wide)
            score(a, from + (size_t)key * a->head_dim + 2 * part, several, queries, scaled, scores + key + part);
    for (; key < keys; key += EW_LANES)
        score(a, from + (size_t)(key / 16) * 16 * a->head_dim + 2 * (key % 16), 1, queries, scaled, scores + key);
    for (int i = 0; i < queries; i++)
        parts[i] = weigh(scores + i * EW_SPAN, a->first, keys, begin[i], end[i], weights + i * EW_SPAN / 2);
    for (; at + wide <= a->head_dim; at += wide) mix(a, queries, several, at, weights, out);
    for (; at < a->head_dim; at += EW_LANES) mix(a, queries, 1, at, weights, out);
}

/* One part of attention: `queries` queries of one kv head, query i over the positions begin[i] .. end[i] - 1 that lie in
   it. parts [queries], out [queries][head_dim]. */
static void attend(const ew_attention *a, int queries, const float *const *q, const int *begin, const int *end,
                   ew_part *parts, float *out) {
#define CASE(N) \
    case N: attend_n(a, N, q, begin, end, parts, out); break;
    switch (queries) {
        EACH_SIZE(CASE)
    }
#undef CASE
}

/* The parts of one query as one; those of span s are parts[s * stride] and mixed[s * stride * head_dim ...]. */
static void combine(int spans, const ew_part *parts, const float *mixed, int stride, int head_dim, float *out) {
    float highest = -INFINITY, total = 0;
    for (int s = 0; s < spans; s++) highest = parts[s * stride].highest > highest ? parts[s * stride].highest : highest;
    for (int i = 0; i < head_dim; i += EW_LANES) store(out + i, splat(0));
    for (int s = 0; s < spans; s++) {
        const ew_part part = parts[s * stride];
        if (part.total == 0) continue; /* nothing that this query sees: adding zeros could turn a -0 */
        const float share = exponential(splat(part.highest - highest))[0];
        total += share * part.total;
        for (int i = 0; i < head_dim; i += EW_LANES)
            store(out + i, load(out + i) + share * load(mixed + (size_t)s * stride * head_dim + i));
    }
    for (int i = 0; i < head_dim; i += EW_LANES) store(out + i, load(out + i) / total);
}

const ew_kernels EW_KERNELS = {EW_NAME, EW_TILE, matmul, quantize, norm, join, rotate, shorten, gate, attend, combine};

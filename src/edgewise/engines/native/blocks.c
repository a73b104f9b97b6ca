/* Decoder layers and the head over packed matrices: what edgewise/engines/native_lm.py calls.

   Nothing here checks shapes; the caller does. Functions that allocate return NULL or 0 when memory is out. */
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "native.h"

#define EXPORT __attribute__((visibility("default")))
#define LEAST_TARGET __attribute__((target("avx2,f16c,fma"))) /* the least that any kernels need */
#define ALIGNMENT 64
#define GROUPS_AT_ONCE 4 /* groups of 16 outputs whose codes are read for tile after tile; they stay in a near cache */
#define ITEMS 4          /* a thread's at least, of a product: so uneven cores finish together, and claims stay few */

static const ew_kernels *_Atomic kernels; /* atomic: two models may be the first at once */
static _Atomic int threads = 1;

static void *aligned(size_t bytes) {
    return aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static int has_avx_vnni(void) {
    unsigned a, b, c, d; /* no name for it in __builtin_cpu_supports before GCC 14 */
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
static int has_avx512bf16(void) { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

static const struct { /* best first */
    const ew_kernels *kernels;
    int (*there)(void);
} all[] = {{&ew_kernels_avx512bf16, has_avx512bf16},
           {&ew_kernels_avx512, has_avx512},
           {&ew_kernels_avxvnni, has_avx_vnni},
           {&ew_kernels_avx2, has_avx2}};

/* Choose the kernels (`name`, or the best this processor has for "") and start `wanted` threads. The name in use, NULL if
   none. No model may compute while others are chosen: the rows of a tile are theirs. */
EXPORT const char *ew_start(const char *name, int wanted) {
    const ew_kernels *best = NULL;
    __builtin_cpu_init();
    for (size_t i = 0; i < sizeof all / sizeof *all && !best; i++)
        if (all[i].there() && (!name[0] || !strcmp(name, all[i].kernels->name))) best = all[i].kernels;
    if (!best) return NULL;
    kernels = best;
    threads = ew_pool_start(wanted);
    return best->name;
}

/* Whether rows come soon. */
EXPORT void ew_expect(int soon) {
    if (soon) ew_pool_announce();
    else ew_pool_rest();
}

/* ---- packing ---- */

typedef struct {
    ew_matrix *to;
    const uint8_t *packed;         /* [outputs][inputs / block][block * bits / 8], 4 bits: even element in the low half */
    const float *scales, *minima;  /* scales [outputs][inputs / block]; minima may be NULL */
    int minima_row, minima_block;  /* strides of minima, in floats */
    _Atomic int misfits;           /* groups with a factor that float16 cannot hold */
} packing;

static int groups_of(const ew_matrix *w) { return (w->outputs + EW_COLUMNS - 1) / EW_COLUMNS; }

LEAST_TARGET static uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
LEAST_TARGET static float to_float(uint16_t x) { return _cvtsh_ss(x); }

LEAST_TARGET static void put(void *to, int bytes, size_t at, float value) {
    if (bytes == 4) ((float *)to)[at] = value;
    else ((uint16_t *)to)[at] = to_half(value);
}

/* Scale and minimum of a row's block. Codes are centred in a bundle, not in a kernel, so the minima move. */
static float scale_of(const packing *p, size_t row, int b) {
    return row < (size_t)p->to->outputs ? p->scales[row * (p->to->inputs / p->to->block) + b] : 0;
}
static float centred_of(const packing *p, size_t row, int b) {
    return row < (size_t)p->to->outputs ? p->minima[row * p->minima_row + (size_t)b * p->minima_block] : 0;
}
static float moved(const packing *p) { return (float)(1 << (p->to->bits - 1)); }

LEAST_TARGET static void pack_factors(const packing *p, int g) {
    const ew_matrix *w = p->to;
    const int blocks = w->inputs / w->block;
    for (int b = 0; b < blocks; b++)
        for (int n = 0; n < EW_COLUMNS; n++) {
            const size_t row = (size_t)g * EW_COLUMNS + n, at = ((size_t)g * blocks + b) * EW_COLUMNS + n;
            const float scale = scale_of(p, row, b);
            put(w->scales, w->factor_bytes, at, scale);
            if (w->minima) put(w->minima, w->factor_bytes, at, centred_of(p, row, b) - moved(p) * scale);
        }
}

/* The minima of float16 must give the bundle's own back. */
LEAST_TARGET static void check_group(void *context, int g, int thread) {
    (void)thread;
    packing *p = context;
    int fit = 1;
    for (int b = 0; b < p->to->inputs / p->to->block; b++)
        for (int n = 0; n < EW_COLUMNS; n++) {
            const size_t row = (size_t)g * EW_COLUMNS + n;
            const float scale = scale_of(p, row, b);
            fit &= to_float(to_half(scale)) == scale;
            if (!p->minima) continue;
            const float centred = centred_of(p, row, b);
            fit &= to_float(to_half(centred - moved(p) * scale)) + moved(p) * scale == centred;
        }
    if (!fit) p->misfits++;
}

/* Eight 4-bit codes, as neighbours in each byte, to the kernels' order: 0..3 in the low halves, 4..7 in the high ones. */
static uint32_t pack8(uint32_t from) {
    const uint32_t even = from & 0x0f0f0f0f, odd = from >> 4 & 0x0f0f0f0f; /* elements 0 2 4 6 and 1 3 5 7 */
    const uint32_t low = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 | (odd & 0xff00) << 16;
    const uint32_t high = (even >> 16 & 0xff) | (odd >> 8 & 0xff00) | (even >> 8 & 0xff0000) | (odd & 0xff000000);
    return low | high << 4;
}

static void pack_group(void *context, int g, int thread) {
    (void)thread;
    const packing *p = context;
    const ew_matrix *w = p->to;
    const int words = w->inputs * w->bits / 32, rows = w->outputs - g * EW_COLUMNS;
    uint32_t *to = (uint32_t *)w->codes + (size_t)g * words * EW_COLUMNS;
    const uint8_t *from = p->packed + (size_t)g * EW_COLUMNS * words * 4;
    pack_factors(p, g);
    for (int i = 0; i < words; i++)
        for (int n = 0; n < EW_COLUMNS; n++) {
            uint32_t word = 0;
            if (n < rows) memcpy(&word, from + ((size_t)n * words + i) * 4, 4);
            to[(size_t)i * EW_COLUMNS + n] = w->bits == 8 ? word : pack8(word);
        }
}

/* Whether float16 holds the scales and minima of a matrix, of which only the sizes and the kind need be set. */
EXPORT int ew_fits_half(const ew_matrix *w, const float *scales, const float *minima, int minima_row, int minima_block) {
    packing p = {(ew_matrix *)w, NULL, scales, minima, minima_row, minima_block, 0};
    ew_parallel(groups_of(w), check_group, &p);
    return !p.misfits;
}

/* Fill codes, scales and minima. */
EXPORT void ew_pack(ew_matrix *w, const uint8_t *packed, const float *scales, const float *minima, int minima_row,
                    int minima_block) {
    packing p = {w, packed, scales, minima, minima_row, minima_block, 0};
    ew_parallel(groups_of(w), pack_group, &p);
}

LEAST_TARGET static float factor(const ew_matrix *w, const void *factors, size_t at) {
    return w->factor_bytes == 4 ? ((const float *)factors)[at] : to_float(((const uint16_t *)factors)[at]);
}

/* out [count][inputs] = rows `ids` of the matrix. */
EXPORT LEAST_TARGET void ew_rows(const ew_matrix *w, const int64_t *ids, int count, float *out) {
    const int words = w->inputs * w->bits / 32, each = 32 / w->bits, blocks = w->inputs / w->block;
    for (int i = 0; i < count; i++) {
        const int g = (int)(ids[i] / EW_COLUMNS), n = (int)(ids[i] % EW_COLUMNS);
        const uint32_t *codes = (const uint32_t *)w->codes + (size_t)g * words * EW_COLUMNS + n;
        for (int at = 0; at < w->inputs; at++) {
            const uint32_t word = codes[(size_t)(at / each) * EW_COLUMNS];
            const int byte = 8 * (at % 4), code = w->bits == 8 ? word >> byte & 255 : word >> (byte + at % 8 / 4 * 4) & 15;
            const size_t f = ((size_t)g * blocks + at / w->block) * EW_COLUMNS + n;
            const float scale = factor(w, w->scales, f), half = (float)(1 << (w->bits - 1));
            *out++ = code * scale + (w->minima ? factor(w, w->minima, f) : -half * scale);
        }
    }
}

/* ---- a checksum: of words of 8 bytes, eight sums in turn, then of the sums ---- */

#define PART ((size_t)1 << 20)

static uint64_t mixed(uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * UINT64_C(0x9e3779b97f4a7c15);
    return sum << 29 | sum >> 35;
}

static uint64_t checksum_of(const uint64_t *words, size_t count) {
    uint64_t sums[8] = {1, 2, 3, 4, 5, 6, 7, 8}, sum = count;
    for (size_t i = 0; i < count; i++) sums[i % 8] = mixed(sums[i % 8], words[i]);
    for (int i = 0; i < 8; i++) sum = mixed(sum, sums[i]);
    return sum;
}

typedef struct {
    const uint64_t *words;
    size_t count;
    uint64_t *sums;
} summed;

static void sum_part(void *context, int item, int thread) {
    (void)thread;
    const summed *s = context;
    const size_t first = item * (PART / 8), left = s->count - first;
    s->sums[item] = checksum_of(s->words + first, left < PART / 8 ? left : PART / 8);
}

/* Of the checksums of each MiB; `bytes` is a multiple of 8. 0 if memory is out. */
EXPORT uint64_t ew_checksum(const uint64_t *words, size_t bytes) {
    const int parts = (int)((bytes + PART - 1) / PART);
    summed s = {words, bytes / 8, malloc((size_t)parts * 8)};
    if (!s.sums) return 0;
    ew_parallel(parts, sum_part, &s);
    const uint64_t sum = checksum_of(s.sums, parts);
    free(s.sums);
    return sum;
}

/* ---- products ---- */

typedef struct {
    const ew_matrix *w;
    const ew_activations *x;
    float *out; /* [rows][stride], room for outputs rounded up to 16 */
    int stride;
    /* When set, w is the gate, and activation(gate) * up, with `up` from its group `up_group` on, goes to `gated` instead. */
    const ew_matrix *up;
    ew_activations *gated;
    int up_group, gelu;
    const float *bias, *up_bias;
} product;

static int least(int a, int b) { return a < b ? a : b; }

/* Some groups of outputs for the rows of one tile. */
static void product_tile(const product *p, int first, int count, int row, int rows) {
    const ew_activations *x = p->x;
    const int8_t *codes = x->codes + (size_t)row * x->inputs;
    const ew_factor *factors = x->factors + (size_t)row * (x->inputs / EW_BLOCK);
    const int at = first * EW_COLUMNS, size = count * EW_COLUMNS;
    if (!p->up) {
        kernels->matmul(p->w, first, count, rows, codes, factors, p->out + (size_t)row * p->stride + at, p->stride);
        return;
    }
    int8_t *to = p->gated->codes + (size_t)row * p->gated->inputs + (size_t)rows * at;
    ew_factor *to_factors = p->gated->factors + (size_t)row * (p->gated->inputs / EW_BLOCK) + (size_t)rows * (at / EW_BLOCK);
    float gate[EW_TILES * EW_COLUMNS * GROUPS_AT_ONCE], up[EW_TILES * EW_COLUMNS * GROUPS_AT_ONCE];
    kernels->matmul(p->w, first, count, rows, codes, factors, gate, size);
    kernels->matmul(p->up, p->up_group + first, count, rows, codes, factors, up, size);
    for (int m = 0; m < rows; m++) {
        float *g = gate + m * size, *u = up + m * size;
        if (p->bias) kernels->join(g, p->bias + at, 1, size);
        if (p->up_bias) kernels->join(u, p->up_bias + at, 1, size);
        kernels->gate(g, u, p->gelu, size, g);
        kernels->quantize(g, size, rows, m, to, to_factors);
    }
}

static int groups_in(const product *p) { return p->up ? p->gated->inputs / EW_COLUMNS : groups_of(p->w); }

/* Rows are worked on in tiles of about the same size: one of few rows costs nearly as much as a full one. */
static int tiles_of(int rows) { return (rows + kernels->tile - 1) / kernels->tile; }
static int tile_start(int rows, int tile) { return (int)((int64_t)rows * tile / tiles_of(rows)); }

/* How a product is shared out: with few rows many groups go together, as each is little work; with many rows a group's are
   shared too, so that the threads finish together. */
typedef struct {
    int groups, tiles; /* of an item */
} share;

static share share_of(const product *p) {
    const int groups = groups_in(p), tiles = tiles_of(p->x->rows), fair = groups / (ITEMS * threads);
    if (tiles > 1) return (share){GROUPS_AT_ONCE, (tiles + 3) / 4};
    return (share){fair < GROUPS_AT_ONCE ? GROUPS_AT_ONCE : fair / 2 * 2, 1}; /* no block of 32 is cut in two */
}

static void product_item(void *context, int item, int thread) {
    (void)thread;
    const product *p = context;
    const share s = share_of(p);
    const int rows = p->x->rows, tiles = tiles_of(rows), parts = (tiles + s.tiles - 1) / s.tiles;
    const int end = least((item / parts + 1) * s.groups, groups_in(p)), last = least((item % parts + 1) * s.tiles, tiles);
    for (int first = item / parts * s.groups; first < end; first += GROUPS_AT_ONCE)
        for (int t = item % parts * s.tiles; t < last; t++) {
            const int row = tile_start(rows, t);
            product_tile(p, first, least(GROUPS_AT_ONCE, end - first), row, tile_start(rows, t + 1) - row);
        }
}

static void multiply(const product *p) {
    const share s = share_of(p);
    const int parts = (tiles_of(p->x->rows) + s.tiles - 1) / s.tiles;
    ew_parallel((groups_in(p) + s.groups - 1) / s.groups * parts, product_item, (void *)p);
}

/* ---- one layer ---- */

typedef struct {
    const ew_kv *kv;           /* [layers] */
    int position, first, rows; /* rows `first` … of the pass stand at `position` … of the session */
} stretch;

typedef struct {
    const ew_card *card;
    const ew_layer *layer;
    const stretch *stretches;
    int number, count, rows;      /* number of the layer, -1 for the head; count of stretches, which are `rows` in all */
    float *x;                     /* [rows][hidden], the residual stream */
    float *wide, *mixed;          /* [rows][widest row between matrices], first of queries, keys and values; [rows][heads * head_dim] */
    int places, spans;            /* room for that many tiles of that many spans each */
    int longest;                  /* most spans of a stretch */
    ew_part *parts;               /* [places][spans][tile] */
    float *mixes;                 /* [places][spans][tile][head_dim] */
    ew_activations a, gated;
    const float *weight; /* of the norm that rows pass on their way to int8; NULL: none */
    const float *source; /* rows of a.inputs floats */
    float *normed;       /* [rows][hidden] */
    int joining;         /* what attention or feed-forward made, in `wide`, is still to be added to x, */
    const float *bias, *post_norm; /* with this bias and after this norm; NULL: none */
} pass;

typedef struct {
    int places, spans;
    stretch *stretches;
    float *wide, *mixed, *normed, *mixes;
    ew_part *parts;
    int8_t *codes, *gated_codes;
    ew_factor *factors, *gated_factors;
} ew_workspace;

EXPORT void ew_workspace_free(ew_workspace *s) {
    if (!s) return;
    free(s->wide), free(s->mixed), free(s->normed), free(s->parts), free(s->mixes), free(s->codes), free(s->factors);
    free(s->gated_codes), free(s->gated_factors), free(s->stretches), free(s);
}

/* Room for passes of up to `rows` rows of up to `sessions` sessions. */
EXPORT ew_workspace *ew_workspace_new(const ew_card *c, int rows, int sessions) {
    const int mixed = c->heads * c->head_dim, qkv = mixed + 2 * c->kv_heads * c->head_dim;
    const int wide = qkv > c->hidden ? qkv : c->hidden, inputs = mixed > c->hidden ? mixed : c->hidden;
    ew_workspace *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->places = threads > c->kv_heads ? threads : c->kv_heads, s->spans = (c->capacity + EW_SPAN - 1) / EW_SPAN;
    const size_t parts = (size_t)s->places * s->spans * EW_TILES;
    s->stretches = calloc(sessions, sizeof(stretch));
    s->wide = aligned((size_t)rows * wide * 4);
    s->mixed = aligned((size_t)rows * mixed * 4);
    s->normed = aligned((size_t)rows * c->hidden * 4);
    s->parts = aligned(parts * sizeof(ew_part));
    s->mixes = aligned(parts * c->head_dim * 4);
    s->codes = aligned((size_t)rows * inputs);
    s->factors = aligned((size_t)rows * (inputs / EW_BLOCK) * sizeof(ew_factor));
    s->gated_codes = aligned((size_t)rows * c->ffn);
    s->gated_factors = aligned((size_t)rows * (c->ffn / EW_BLOCK) * sizeof(ew_factor));
    if (!s->stretches || !s->wide || !s->mixed || !s->normed || !s->parts || !s->mixes || !s->codes || !s->factors ||
        !s->gated_codes || !s->gated_factors) {
        ew_workspace_free(s);
        return NULL;
    }
    return s;
}

/* x += scale * norm(part + bias), `part` in p->wide. */
static void join_row(const pass *p, int row) {
    const int size = p->card->hidden;
    float *part = p->wide + (size_t)row * size;
    if (p->bias) kernels->join(part, p->bias, 1, size);
    if (p->post_norm) kernels->norm(part, p->post_norm, p->card->norm_eps, size, part);
    kernels->join(p->x + (size_t)row * size, part, p->card->residual_scale, size);
}

static void join_tile(void *context, int tile, int thread) {
    (void)thread;
    const pass *p = context;
    for (int row = tile_start(p->rows, tile); row < tile_start(p->rows, tile + 1); row++) join_row(p, row);
}

/* The join is left to the next step, which takes x row by row. */
static void join_later(pass *p, const float *bias, const float *post_norm) {
    p->joining = 1, p->bias = bias, p->post_norm = post_norm;
}

static void join_now(pass *p) {
    if (p->joining) ew_parallel(tiles_of(p->rows), join_tile, p);
    p->joining = 0;
}

static void quantize_tile(void *context, int tile, int thread) {
    const pass *p = context;
    const int first = tile_start(p->rows, tile), rows = tile_start(p->rows, tile + 1) - first, inputs = p->a.inputs;
    int8_t *codes = p->a.codes + (size_t)first * inputs;
    ew_factor *factors = p->a.factors + (size_t)first * (inputs / EW_BLOCK);
    if (p->joining) join_tile(context, tile, thread);
    for (int m = 0; m < rows; m++) {
        const float *x = p->source + (size_t)(first + m) * inputs;
        float *normed = p->normed + (size_t)(first + m) * inputs;
        if (p->weight) kernels->norm(x, p->weight, p->card->norm_eps, inputs, normed);
        kernels->quantize(p->weight ? normed : x, inputs, rows, m, codes, factors);
    }
}

/* Rows of `source` [rows][inputs] to int8, normed before if there is a weight; with what x still is to get. */
static void quantize(pass *p, const float *source, int inputs, const float *weight) {
    p->source = source, p->weight = weight;
    p->a = (ew_activations){p->rows, inputs, p->a.codes, p->a.factors};
    ew_parallel(tiles_of(p->rows), quantize_tile, p);
    p->joining = 0;
}

/* Norm and rotation of the queries or keys of one row. */
static void turn_heads(const pass *p, float *heads, int count, int position, const float *weight) {
    const ew_card *c = p->card;
    const int half = p->layer->turned / 2;
    if (weight && c->whole_norm) kernels->norm(heads, weight, c->norm_eps, count * c->head_dim, heads);
    for (int h = 0; h < count; h++) {
        float *x = heads + h * c->head_dim;
        if (weight && !c->whole_norm) kernels->norm(x, weight, c->norm_eps, c->head_dim, x);
        kernels->rotate(x, p->layer->cos + (size_t)position * half, p->layer->sin + (size_t)position * half, half);
    }
}

/* Bias, norms and rotation of one row's queries, keys and values; keys and values go to their places. */
static void place_row(const pass *p, const stretch *s, int row) {
    const ew_card *c = p->card;
    const ew_kv *to = s->kv + p->number;
    const int q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, at = s->position + row;
    float *queries = p->wide + (size_t)(s->first + row) * (q + 2 * kv), *keys = queries + q, *values = keys + kv;
    uint16_t kept[EW_HEAD_DIM];
    if (p->layer->qkv_bias) kernels->join(queries, p->layer->qkv_bias, 1, q + 2 * kv);
    turn_heads(p, queries, c->heads, at, p->layer->q_norm);
    turn_heads(p, keys, c->kv_heads, at, p->layer->k_norm);
    for (int h = 0; h < c->kv_heads; h++, keys += c->head_dim, values += c->head_dim) {
        const size_t head = (size_t)h * c->capacity * c->head_dim;
        uint16_t *k = to->keys + head + (size_t)(at / 16) * 16 * c->head_dim + at % 16 * 2;
        uint16_t *v = to->values + head + (size_t)(at / 2) * 2 * c->head_dim + at % 2;
        kernels->shorten(keys, c->head_dim, kept);
        for (int d = 0; d < c->head_dim; d += 2) memcpy(k + 16 * d, kept + d, 4);
        kernels->shorten(values, c->head_dim, kept);
        for (int d = 0; d < c->head_dim; d++) v[2 * d] = kept[d];
        if (at % 2 == 0) /* the next position weighs 0 until it is written, which makes 0 only of finite numbers */
            for (int d = 0; d < c->head_dim; d++) v[2 * d + 1] = 0;
    }
}

static int sixteens(const stretch *s) { return (s->position + s->rows - 1) / 16 - s->position / 16 + 1; }

/* The rows whose keys share cache lines, by one thread. */
static void place_sixteen(void *context, int item, int thread) {
    (void)thread;
    const pass *p = context;
    const stretch *s = p->stretches;
    for (; item >= sixteens(s); s++) item -= sixteens(s);
    const int first = (s->position / 16 + item) * 16 - s->position;
    for (int row = first > 0 ? first : 0; row < least(first + 16, s->rows); row++) place_row(p, s, row);
}

static void place(pass *p) {
    int items = 0;
    for (int i = 0; i < p->count; i++) items += sixteens(p->stretches + i);
    ew_parallel(items, place_sixteen, p);
}

/* Queries are numbered stretch by stretch, kv head by kv head, row by row, head by head; a tile has those of one kv head. */
static int tiles_per_kv_head(const pass *p, const stretch *s) {
    return (s->rows * (p->card->heads / p->card->kv_heads) + kernels->tile - 1) / kernels->tile;
}

static int spans(const stretch *s) { return (s->position + s->rows + EW_SPAN - 1) / EW_SPAN; }

typedef struct {
    const stretch *of;
    int queries, kv_head, begin[EW_TILES], end[EW_TILES];
    const float *q[EW_TILES];
    float *out[EW_TILES];
} tile;

static tile tile_of(const pass *p, int number) {
    const ew_card *c = p->card;
    const stretch *s = p->stretches;
    for (; number >= c->kv_heads * tiles_per_kv_head(p, s); s++) number -= c->kv_heads * tiles_per_kv_head(p, s);
    const int tiles = tiles_per_kv_head(p, s), sharing = c->heads / c->kv_heads, first = number % tiles * kernels->tile;
    const int q_size = c->heads * c->head_dim, stride = q_size + 2 * c->kv_heads * c->head_dim;
    tile t = {.of = s, .queries = least(kernels->tile, s->rows * sharing - first), .kv_head = number / tiles};
    for (int i = 0; i < t.queries; i++) {
        const int row = (first + i) / sharing, head = t.kv_head * sharing + (first + i) % sharing;
        t.q[i] = p->wide + (size_t)(s->first + row) * stride + head * c->head_dim;
        t.out[i] = p->mixed + (size_t)(s->first + row) * q_size + head * c->head_dim;
        t.end[i] = s->position + row + 1;
        t.begin[i] = p->layer->window && t.end[i] > p->layer->window ? t.end[i] - p->layer->window : 0;
    }
    return t;
}

/* What the tile's queries see in one span, into `parts` [queries] and `mixed` [queries][head_dim]. */
static void attend_span(const pass *p, const tile *t, int span, ew_part *parts, float *mixed) {
    const ew_card *c = p->card;
    const int from = span * EW_SPAN, begin = t->begin[0] / 16 * 16, end = t->end[t->queries - 1];
    const size_t head = (size_t)t->kv_head * c->capacity * c->head_dim;
    const ew_kv *kv = t->of->kv + p->number;
    const ew_attention a = {kv->keys + head, kv->values + head, c->head_dim, begin > from ? begin : from,
                            least(end, from + EW_SPAN), c->attention_scale, c->attention_cap};
    if (a.first < a.end) kernels->attend(&a, t->queries, t->q, t->begin, t->end, parts, mixed);
    else
        for (int i = 0; i < t->queries; i++) parts[i] = (ew_part){-INFINITY, 0};
}

static void combine_tile(const pass *p, const tile *t, const ew_part *parts, const float *mixed) {
    const int size = p->card->head_dim;
    for (int i = 0; i < t->queries; i++)
        kernels->combine(spans(t->of), parts + i, mixed + (size_t)i * size, kernels->tile, size, t->out[i]);
}

/* Many tiles: each is an item, its spans one after the other. Few, as in decoding: each span of each tile is one. */
static void attend_tile(void *context, int item, int thread) {
    const pass *p = context;
    const tile t = tile_of(p, item);
    ew_part *parts = p->parts + (size_t)thread * p->spans * kernels->tile;
    float *mixed = p->mixes + (size_t)thread * p->spans * kernels->tile * p->card->head_dim;
    for (int s = 0; s < spans(t.of); s++)
        attend_span(p, &t, s, parts + s * kernels->tile, mixed + (size_t)s * kernels->tile * p->card->head_dim);
    combine_tile(p, &t, parts, mixed);
}

static void attend_part(void *context, int item, int thread) {
    (void)thread;
    const pass *p = context;
    const int number = item / p->longest, span = item % p->longest;
    const tile t = tile_of(p, number);
    const size_t place = ((size_t)number * p->spans + span) * kernels->tile;
    if (span < spans(t.of)) attend_span(p, &t, span, p->parts + place, p->mixes + place * p->card->head_dim);
}

static void attend(pass *p) {
    int tiles = 0;
    p->longest = 0;
    for (const stretch *s = p->stretches; s < p->stretches + p->count; s++) {
        tiles += p->card->kv_heads * tiles_per_kv_head(p, s);
        if (spans(s) > p->longest) p->longest = spans(s);
    }
    if (tiles > p->places) {
        ew_parallel(tiles, attend_tile, p);
        return;
    }
    ew_parallel(tiles * p->longest, attend_part, p);
    for (int i = 0; i < tiles; i++) {
        const tile t = tile_of(p, i);
        const size_t place = (size_t)i * p->spans * kernels->tile;
        combine_tile(p, &t, p->parts + place, p->mixes + place * p->card->head_dim);
    }
}

static void multiply_into(const pass *p, const ew_matrix *w, float *out, int stride) {
    multiply(&(product){.w = w, .x = &p->a, .out = out, .stride = stride});
}

/* ---- watching: what took how long, for `edgewise profile` ---- */

#define STEPS(X) X(norm) X(qkv) X(place) X(attend) X(round) X(o) X(ffn_norm) X(gate_up) X(down) X(add) X(head_norm) X(head)
#define NUMBER(name) step_##name,
#define NAME(name) #name " "
enum { STEPS(NUMBER) };
EXPORT const char *ew_steps(void) { return STEPS(NAME); }

static struct {
    ew_span *_Atomic room;
    _Atomic int capacity, count;
} watched;

/* Note spans in `room` from now on, `capacity` of them at most; NULL stops it. Spans noted so far. The room must stay: a
   model that computes meanwhile may still note a step. */
EXPORT int ew_watch(ew_span *room, int capacity) {
    const int count = least(watched.count, watched.capacity);
    watched.room = NULL;
    watched.capacity = capacity;
    watched.count = 0;
    watched.room = room;
    return count;
}

/* 0 while nobody watches. */
static int64_t now(void) {
    struct timespec t;
    if (!watched.room) return 0;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void note(int layer, int step, int64_t start) {
    ew_span *room = watched.room;
    if (!start || !room || watched.count >= watched.capacity) return;
    const int at = watched.count++; /* of another model's thread too */
    if (at < watched.capacity) room[at] = (ew_span){start, now(), layer, step};
}

#define STEP(name, call) \
    do { \
        const int64_t start = now(); \
        call; \
        note(p->number, step_##name, start); \
    } while (0)

/* ---- layers and head ---- */

static void products_of_qkv(pass *p) {
    const ew_card *c = p->card;
    const int q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, starts[] = {0, q, q + kv};
    for (int i = 0; i < 3 && p->layer->qkv[i]; i++) multiply_into(p, p->layer->qkv[i], p->wide + starts[i], q + 2 * kv);
}

static void product_of_gate_and_up(pass *p) {
    const ew_layer *l = p->layer;
    const int ffn = p->card->ffn, fused = l->gate_up[1] == NULL;
    p->gated.rows = p->rows;
    multiply(&(product){.w = l->gate_up[0],
                        .x = &p->a,
                        .gated = &p->gated,
                        .up = fused ? l->gate_up[0] : l->gate_up[1],
                        .up_group = fused ? ffn / EW_COLUMNS : 0,
                        .gelu = p->card->gelu,
                        .bias = l->gate_up_bias,
                        .up_bias = l->gate_up_bias ? l->gate_up_bias + ffn : NULL});
}

/* Go on with the rows that are wanted, one session's behind the other's. */
static void keep(pass *p, stretch *stretches, const ew_session *sessions) {
    const size_t hidden = p->card->hidden, wide = (size_t)(p->card->heads + 2 * p->card->kv_heads) * p->card->head_dim;
    p->rows = 0;
    for (int i = 0; i < p->count; i++) {
        stretch *s = stretches + i;
        const int wanted = sessions[i].wanted, less = s->rows - wanted;
        memmove(p->x + p->rows * hidden, p->x + (s->first + less) * hidden, wanted * hidden * sizeof(float));
        memmove(p->wide + p->rows * wide, p->wide + (s->first + less) * wide, wanted * wide * sizeof(float));
        *s = (stretch){s->kv, s->position + less, p->rows, wanted};
        p->rows += wanted;
    }
}

static void remember(pass *p) {
    STEP(norm, quantize(p, p->x, p->card->hidden, p->layer->attention_norm));
    STEP(qkv, products_of_qkv(p));
    STEP(place, place(p));
}

static void attention(pass *p) {
    const ew_card *c = p->card;
    const ew_layer *l = p->layer;
    STEP(attend, attend(p));
    STEP(round, quantize(p, p->mixed, c->heads * c->head_dim, NULL));
    STEP(o, multiply_into(p, l->o, p->wide, c->hidden));
    join_later(p, l->o_bias, l->attention_post_norm);
}

static void feed_forward(pass *p) {
    const ew_card *c = p->card;
    const ew_layer *l = p->layer;
    STEP(ffn_norm, quantize(p, p->x, c->hidden, l->ffn_norm));
    STEP(gate_up, product_of_gate_and_up(p));
    STEP(down, multiply(&(product){.w = l->down, .x = &p->gated, .out = p->wide, .stride = c->hidden}));
    join_later(p, l->down_bias, l->ffn_post_norm);
}

static void finish(pass *p) { STEP(add, join_now(p)); }

/* Run rows of `x` [rows][hidden], session after session, through the layers, in place. The last layer gives the wanted
   rows only, in front; what stands behind them then is undefined. */
EXPORT void ew_layers(const ew_card *card, const ew_layer *layers, int depth, ew_workspace *s, const ew_session *sessions,
                     int count, float *x) {
    pass p = {.card = card, .stretches = s->stretches, .count = count, .x = x, .wide = s->wide, .mixed = s->mixed,
              .normed = s->normed, .a = {.codes = s->codes, .factors = s->factors},
              .gated = {.inputs = card->ffn, .codes = s->gated_codes, .factors = s->gated_factors}};
    p.places = s->places, p.spans = s->spans, p.parts = s->parts, p.mixes = s->mixes;
    for (int i = 0; i < count; i++) {
        s->stretches[i] = (stretch){sessions[i].kv, sessions[i].position, p.rows, sessions[i].rows};
        p.rows += sessions[i].rows;
    }
    for (int i = 0; i < depth; i++) {
        p.layer = layers + i, p.number = i;
        remember(&p);
        if (i == depth - 1) keep(&p, s->stretches, sessions);
        if (!p.rows) return;
        attention(&p);
        feed_forward(&p);
    }
    finish(&p);
}

/* logits [rows][stride] = w · norm(x); rows at most those of the workspace, stride at least outputs rounded up to 16. */
EXPORT void ew_head(const ew_card *card, const float *norm, const ew_matrix *w, ew_workspace *s, int rows, const float *x,
                    float *logits, int stride) {
    pass head = {.card = card, .number = -1, .rows = rows, .normed = s->normed, .a = {.codes = s->codes, .factors = s->factors}};
    pass *p = &head;
    STEP(head_norm, quantize(p, x, card->hidden, norm));
    STEP(head, multiply_into(p, w, logits, stride));
}

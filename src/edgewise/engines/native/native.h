/* What the parts of the native block runtime share. All floats are float32; all sizes are elements, not bytes. */
#ifndef EDGEWISE_NATIVE_H
#define EDGEWISE_NATIVE_H

#include <stdint.h>

#define EW_COLUMNS 16 /* outputs that one vector of a packed matrix holds */
#define EW_BLOCK 32   /* inputs that one scale of quantized activations covers */
#define EW_HEAD_DIM 256 /* the largest head that kernels take; heads are multiples of 16 */
#define EW_TILES 12   /* most rows of activations, and most queries, that any kernels work on at once */

/* A quantized matrix [outputs, inputs], packed for kernels that compute EW_COLUMNS outputs at once.
   weight = code * scale + minimum, code in 0 .. 2^bits - 1, one scale and minimum per `block` inputs.
   codes: [outputs / 16][inputs / 32][32 * bits / 8 * 16] bytes. Each 64 bytes hold 4 inputs of 16 outputs, output by output;
   with 4 bits the low halves are inputs 8c .. 8c+3 and the high halves 8c+4 .. 8c+7.
   scales, minima: [outputs / 16][inputs / block][16] of `factor_bytes`: float16 where all are that exactly (decoding is
   bound by the bytes that it reads), else float32. No minima: all are -2^(bits - 1) * scale. Outputs are padded to 16 with
   zeros. */
typedef struct {
    int outputs, inputs, bits, block, factor_bytes;
    uint8_t *codes;
    void *scales, *minima;
} ew_matrix;

/* Activations rounded to int8 with one scale per 32 inputs, in tiles of at most ew_kernels.tile rows, all about as many.
   codes: per tile [inputs / 32][rows of the tile][32]; factors: per tile [inputs / 32][rows of the tile] of ew_factor. */
typedef struct {
    float scale;     /* of the block */
    float sum;       /* scale * sum of codes, over 32 inputs */
    float half[2];   /* the same over each 16 */
} ew_factor;

typedef struct {
    int rows, inputs;
    int8_t *codes;
    ew_factor *factors;
} ew_activations;

/* Keys and values of one layer and session, bfloat16: keys [kv_heads][capacity / 16][head_dim / 2][16 positions][2
   dimensions], values [kv_heads][capacity / 2][head_dim][2 positions]. */
typedef struct {
    uint16_t *keys, *values;
} ew_kv;

/* Rows that are appended to one session; the last `wanted` of them are to come out. */
typedef struct {
    const ew_kv *kv; /* [layers] */
    int position, rows, wanted;
} ew_session;

/* One decoder layer. Matrices that were fused stand in the first place, with NULL behind them. A missing vector is NULL. */
typedef struct {
    const ew_matrix *qkv[3], *o, *gate_up[2], *down;
    const float *attention_norm, *q_norm, *k_norm, *attention_post_norm, *ffn_norm, *ffn_post_norm;
    const float *qkv_bias, *o_bias, *gate_up_bias, *down_bias;
    const float *cos, *sin; /* [capacity][turned / 2] */
    int turned;             /* dimensions of a head that rotate; 0: none */
    int window;             /* positions that a row sees, itself included; 0: all */
} ew_layer;

typedef struct {
    int hidden, heads, kv_heads, head_dim, ffn, capacity;
    int gelu;       /* the gate's activation: 0 silu, 1 gelu (tanh form) */
    int whole_norm; /* q_norm and k_norm: 0 each head by itself, 1 all heads as one vector */
    float norm_eps, attention_scale, attention_cap, residual_scale; /* cap 0: none */
} ew_card;

/* Keys are attended to in spans of EW_SPAN positions, counted from 0, so that many threads can share one query. What a span
   gives for a query: its highest score, the sum of the weights exp(score - highest), and the values by these weights.
   Parts are combined in the order of their spans, however they were shared out. */
#define EW_SPAN 256

typedef struct {
    const uint16_t *keys, *values; /* of one kv head */
    int head_dim, first, end;   /* positions of this part, within one span; first is a multiple of 16 */
    float scale, cap;
} ew_attention;

typedef struct {
    float highest, total;
} ew_part;

/* When a step of a pass began and ended, nanoseconds of the monotonic clock. Steps: ew_steps in blocks.c. */
typedef struct {
    int64_t start, end;
    int layer, step; /* layer -1: the head */
} ew_span;

/* The kernels of one instruction set. Every row's result has the same bits whatever rows are computed beside it. */
typedef struct {
    const char *name;
    int tile; /* rows of activations, or queries (row and head pairs), that are worked on at once; at most EW_TILES */
    void (*matmul)(const ew_matrix *w, int first_group, int groups, int rows, const int8_t *codes, const ew_factor *factors,
                   float *out, int out_stride);
    void (*quantize)(const float *x, int inputs, int rows, int row, int8_t *codes, ew_factor *factors);
    void (*norm)(const float *x, const float *weight, float eps, int size, float *out);
    void (*join)(float *x, const float *part, float scale, int size);
    void (*rotate)(float *x, const float *cos, const float *sin, int half);
    void (*shorten)(const float *x, int size, uint16_t *out); /* to bfloat16 */
    void (*gate)(const float *gate, const float *up, int gelu, int size, float *out);
    void (*attend)(const ew_attention *a, int queries, const float *const *q, const int *begin, const int *end, ew_part *parts,
                   float *out);
    void (*combine)(int spans, const ew_part *parts, const float *mixed, int stride, int head_dim, float *out);
} ew_kernels;

extern const ew_kernels ew_kernels_avx512bf16, ew_kernels_avx512, ew_kernels_avxvnni, ew_kernels_avx2;

/* Threads. ew_parallel calls f(context, i, thread) once for each i < items, on the caller's thread (number 0) and the
   pool's (1 .. threads - 1). ew_pool_start gives the number of threads there are; it never ends one. A fork's child has
   none until it starts its own. */
int ew_pool_start(int threads);
void ew_pool_rest(void);     /* no work comes for longer than that: threads that wait for some need not spin */
void ew_pool_announce(void); /* work comes in some 100 us: threads that sleep wake up meanwhile */
void ew_parallel(int items, void (*f)(void *context, int item, int thread), void *context);

#endif

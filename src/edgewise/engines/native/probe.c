/* How fast the products of decoding and prefill are on this machine: what edgewise/engines/native_probe.py calls.

   A load is one matrix of random codes, times rows of activations, by the very path that a model's head takes: a norm,
   rounding to int8, the product, shared out to the pool. Many copies of the matrix, used in turn, cannot stay in a cache. */
#include <stdlib.h>
#include <time.h>

#include "native.h"

#define EXPORT __attribute__((visibility("default")))
#define ALIGNMENT 64
#define HALF_SCALE 0x2000   /* 2^-7 in float16, and the minima are -8 of them: what weights look like */
#define HALF_MINIMUM 0xac00 /* -2^-4 */

typedef struct ew_workspace ew_workspace;
ew_workspace *ew_workspace_new(const ew_card *card, int rows, int sessions);
void ew_workspace_free(ew_workspace *workspace);
void ew_head(const ew_card *card, const float *norm, const ew_matrix *w, ew_workspace *s, int rows, const float *x, float *logits,
             int stride);

typedef struct {
    ew_card card;
    ew_workspace *workspace;
    ew_matrix *copies;
    int count, next, rows, stride;
    float *norm, *x, *out;
} ew_load;

static void *aligned(size_t bytes) { return aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT); }

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static uint16_t *halves(size_t count, uint16_t value) {
    uint16_t *all = aligned(2 * count);
    for (size_t i = 0; all && i < count; i++) all[i] = value;
    return all;
}

static float *floats(size_t count, float step) {
    float *all = aligned(4 * count);
    for (size_t i = 0; all && i < count; i++) all[i] = 1 + step * (float)(i % 61);
    return all;
}

static int fill(ew_matrix *w, int outputs, int inputs, int bits) {
    const size_t factors = (size_t)outputs * (inputs / EW_BLOCK), words = (size_t)outputs * inputs * bits / 64;
    *w = (ew_matrix){outputs, inputs, bits, EW_BLOCK, 2, aligned(8 * words), halves(factors, HALF_SCALE), NULL};
    if (bits == 4) w->minima = halves(factors, HALF_MINIMUM);
    if (!w->codes || !w->scales || (bits == 4 && !w->minima)) return 0;
    uint64_t code = 1;
    for (size_t i = 0; i < words; i++) ((uint64_t *)w->codes)[i] = code = code * UINT64_C(6364136223846793005) + 1442695040888963407;
    return 1;
}

EXPORT void ew_load_free(ew_load *l) {
    if (!l) return;
    for (int i = 0; i < l->count; i++) free(l->copies[i].codes), free(l->copies[i].scales), free(l->copies[i].minima);
    ew_workspace_free(l->workspace);
    free(l->copies), free(l->norm), free(l->x), free(l->out), free(l);
}

/* `copies` matrices [outputs, inputs] of 4 bits with minima or 8 bits without, and `rows` rows; outputs are a multiple of 16,
   inputs of 32. NULL if memory is out. Kernels must have been started. */
EXPORT ew_load *ew_load_new(int outputs, int inputs, int bits, int copies, int rows) {
    ew_load *l = calloc(1, sizeof *l);
    if (!l) return NULL;
    l->card = (ew_card){.hidden = inputs, .heads = 1, .kv_heads = 1, .head_dim = EW_COLUMNS, .ffn = EW_BLOCK, .capacity = EW_COLUMNS,
                        .norm_eps = 1e-5f};
    l->rows = rows, l->stride = outputs, l->workspace = ew_workspace_new(&l->card, rows, 1);
    l->norm = floats(inputs, 0), l->x = floats((size_t)rows * inputs, 0.01f), l->out = floats((size_t)rows * outputs, 0);
    l->copies = calloc(copies, sizeof *l->copies);
    int good = l->workspace && l->norm && l->x && l->out && l->copies;
    while (good && l->count < copies) good = fill(&l->copies[l->count++], outputs, inputs, bits);
    if (good) return l;
    ew_load_free(l);
    return NULL;
}

/* Nanoseconds for so many products, each with the next copy. */
EXPORT int64_t ew_load_run(ew_load *l, int products) {
    const int64_t start = now();
    for (int i = 0; i < products; i++) {
        ew_head(&l->card, l->norm, &l->copies[l->next], l->workspace, l->rows, l->x, l->out, l->stride);
        l->next = (l->next + 1) % l->count;
    }
    return now() - start;
}

static void nothing(void *context, int item, int thread) { (void)context, (void)item, (void)thread; }

/* Nanoseconds to hand out `items` items of no work, so many times. */
EXPORT int64_t ew_handovers(int items, int times) {
    const int64_t start = now();
    for (int i = 0; i < times; i++) ew_parallel(items, nothing, NULL);
    return now() - start;
}

/* What Python calls: which instruction sets there are, products and dense weights, over all tiles and threads. */
#include <stdlib.h>

#include "kernels.h"

#ifdef HAVE_X86
#include <cpuid.h>
#endif
#if defined(HAVE_AMX) && !defined(COMPRESSOR_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORT __attribute__((visibility("default")))

/* From slow to fast, numbered as in __init__.py. */
enum { IS_PORTABLE, IS_AVX2, IS_AVX_VNNI, IS_AVX512_VNNI, IS_AMX };

static const Isa *isa_of(int number) {
    switch (number) {
#ifdef HAVE_X86
    case IS_AVX2: return &AVX2;
    case IS_AVX512_VNNI: return &AVX512_VNNI;
#endif
#ifdef HAVE_AVX_VNNI
    case IS_AVX_VNNI: return &AVX_VNNI;
#endif
#if defined(HAVE_AMX) || defined(COMPRESSOR_TILES)
    case IS_AMX: return &AMX;
#endif
    default: return &PORTABLE;
    }
}

#ifdef HAVE_X86
/* Linux lends the tiles' registers to those that ask. */
static int amx_granted(void) {
#ifdef COMPRESSOR_TILES
    return 1;
#elif defined(HAVE_AMX)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
    return 0;
#endif
}

/* The instruction sets that both the processor and the operating system know, as bits. */
static int x86_isas(void) {
    unsigned a, b, c, d, more = 0, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const unsigned fma_xsave_avx_f16c = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;
    if ((c & fma_xsave_avx_f16c) != fma_xsave_avx_f16c || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (a >= 1) {
        unsigned b1, c1, d1;
        __get_cpuid_count(7, 1, &more, &b1, &c1, &d1);
    }
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* the registers that the system saves */
    if ((low & 0x06) != 0x06 || !(b >> 5 & 1)) return 0;
    int found = 1 << IS_AVX2;
#ifdef HAVE_AVX_VNNI
    found |= (int)(more >> 4 & 1) << IS_AVX_VNNI;
#endif
    const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    if ((low & 0xe6) != 0xe6 || (b & f_dq_bw_vl) != f_dq_bw_vl || !(c >> 11 & 1)) return found;
    found |= 1 << IS_AVX512_VNNI;
    int tiles = (low & 0x60000) == 0x60000 && (d >> 24 & 3) == 3;
#ifdef COMPRESSOR_TILES
    tiles = 1;
#endif
    return tiles && amx_granted() ? found | 1 << IS_AMX : found;
}
#endif

/* The instruction sets that this machine has, as bits. */
EXPORT int compressor_isas(void) {
    int found = 1 << IS_PORTABLE;
#ifdef HAVE_X86
    found |= x86_isas();
#endif
    return found;
}

/* As many threads as are worth waking, which takes as long as some hundred thousand weights. */
INLINE int threads_for(int rows, int columns, int tokens, int threads) {
    const size_t shares = (size_t)rows * (size_t)columns * ((size_t)tokens + 4) >> 22;
    return shares < (size_t)threads ? 1 + (int)shares : threads;
}

/* The columns from `first` on that are decoded at once: whole groups, or a part of one. */
static void set_segment(const Weight *weight, int first, Segment *segment) {
    const int group = weight->group ? weight->group : weight->columns;
    const int most = group <= SEGMENT ? SEGMENT / group * group : at_most(SEGMENT, group - first % group);
    segment->bits = weight->bits;
    segment->first = first;
    segment->columns = at_most(most, weight->columns - first);
    segment->run = at_most(group, segment->columns);
}

/* The bias of a tile's rows, of those that there are. */
static void read_bias(const void *bias, int is_bf16, int tile, int rows, float out[ROWS]) {
    for (int i = 0; i < ROWS; i++) {
        const int row = tile * ROWS + i;
        if (!bias || row >= rows) out[i] = 0;
        else out[i] = is_bf16 ? float_of((uint32_t)((const uint16_t *)bias)[row] << 16) : ((const float *)bias)[row];
    }
}

/* Sums [tokens][ROWS] of a tile, to the bias. */
static void multiply_tile(const Isa *isa, const Weight *weight, const Activations *x, int tile, const float bias[ROWS],
                          float *sums) {
    Segment segment; /* not cleared, which would take as long as a tenth of the product */
    for (int m = 0; m < x->tokens; m++) memcpy(sums + m * ROWS, bias, ROWS * sizeof *sums);
    for (int first = 0; first < weight->columns; first += segment.columns) {
        set_segment(weight, first, &segment);
        isa->decode(weight, tile, &segment);
        isa->multiply(&segment, x, sums);
    }
}

/* y = x W^T + bias, for x [tokens, columns] and y [tokens, rows]; x is rounded by the scales [tokens], or by its own if they
 * are NULL. Returns 0, or 1 if there is no memory. */
EXPORT int compressor_linear(int isa_number, int bits, int group, int half_floats, int rows, int columns,
                             const void *codes, const void *high, const void *scales, void *x, const void *given,
                             const void *bias, void *y, int tokens, int is_bf16, int threads) {
    const Isa *isa = isa_of(isa_number);
    const Weight weight = {codes, high, scales, bits, group, half_floats, rows, columns};
    const Matrix in = {x, is_bf16, columns};
    Matrix out = {y, is_bf16, rows};
    const int span = group ? at_most(BLOCK, group & -group) : BLOCK, blocks = columns / BLOCK;
    const int tiles = (rows + ROWS - 1) / ROWS, most = at_most(tokens, TOKENS);
    const size_t bytes = (size_t)blocks * BLOCK * (size_t)most, numbers = (size_t)(blocks * (BLOCK / span)) * (size_t)most;
    float *memory = malloc(2 * numbers * sizeof *memory + bytes);
    if (!memory) return 1;
    for (int begin = 0; begin < tokens; begin += TOKENS) {
        const int count = at_most(TOKENS, tokens - begin);
        Activations rounded = {(int8_t *)(memory + 2 * numbers), memory, memory + numbers, count, span, given};
#pragma omp parallel num_threads(threads_for(rows, columns, tokens, threads))
        {
            _Alignas(64) float sums[TOKENS * ROWS];
#pragma omp for schedule(static)
            for (int block = 0; block < blocks; block++) isa->round(&in, (size_t)begin, block, bits, &rounded);
#pragma omp for schedule(static)
            for (int tile = 0; tile < tiles; tile++) {
                float of_rows[ROWS];
                read_bias(bias, is_bf16, tile, rows, of_rows);
                multiply_tile(isa, &weight, &rounded, tile, of_rows, sums);
                isa->store(sums, tile, count, (size_t)begin, &out);
            }
        }
    }
    free(memory);
    return 0;
}

/* The weight [rows, out_columns], of which the padded one has `columns`. */
EXPORT void compressor_dequantize(int isa_number, int bits, int group, int half_floats, int rows, int columns,
                                  const void *codes, const void *high, const void *scales, void *w, int out_columns,
                                  int is_bf16, int threads) {
    const Isa *isa = isa_of(isa_number);
    const Weight weight = {codes, high, scales, bits, group, half_floats, rows, columns};
    Matrix out = {w, is_bf16, out_columns};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int tile = 0; tile < (rows + ROWS - 1) / ROWS; tile++) isa->dequantize(&weight, tile, &out);
}

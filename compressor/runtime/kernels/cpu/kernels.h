/* What the files of the CPU kernels share.
 *
 * A weight lies in tiles of 16 rows, as compressor/runtime/kernels/layouts/tile_order.py describes. A product is made tile by tile, and
 * of a tile segment by segment of its columns: `decode` turns the segment's codes into bytes, which stay in the first-level
 * cache while `multiply` takes one block of tokens after another through them. So a code is decoded once for all tokens.
 *
 * Activations are rounded to 8 bits, and sums of products of codes with them are exact integers. Activations, and the bytes
 * of a row, lie in the order in which shifting and masking yields the bytes: columns change places within a run of a lane.
 */
#ifndef COMPRESSOR_KERNELS_H
#define COMPRESSOR_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are little-endian"
#endif

#ifdef __x86_64__
#define HAVE_X86 1
#if __has_include(<avxvnniintrin.h>)
#define HAVE_AVX_VNNI 1
#endif
#if __has_include(<amxint8intrin.h>) && defined(__linux__)
#define HAVE_AMX 1
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

enum {
    ROWS = 16,      /* of a tile */
    TILE = 512,     /* bytes of the codes of a tile of one chunk; half as many for the third bits */
    BLOCK = 32,     /* columns at most of which a token's activations share a scale; every chunk is some of them */
    SEGMENT = 512,  /* columns at most that are decoded at once */
    TOKENS = 64,    /* that are multiplied by what was decoded */
    LEAST_RUN = 8,  /* columns of the smallest group that a layout has */
    AHEAD_SCALES = 1024, /* bytes of scales that are asked for before they are needed */
};

/* A packed weight; see compressor/runtime/kernels/layouts/int_groups.py. */
typedef struct {
    const uint8_t *codes, *high, *scales;
    int bits, group, half_floats; /* group: its columns, 0 for the row. half_floats: the scales are fp16, not bf16 */
    int rows, columns;            /* columns: padded to whole chunks */
} Weight;

/* Columns of one tile, decoded. A run of them shares the weight's scales and zero points. */
typedef struct {
    _Alignas(64) uint8_t codes[ROWS * SEGMENT]; /* their order is between `decode` and `multiply` */
    _Alignas(64) float scale[SEGMENT / LEAST_RUN][ROWS];
    _Alignas(64) float zero[SEGMENT / LEAST_RUN][ROWS];
    int bits, first, columns, run;
} Segment;

/* Activations: x is about codes * scale. A span of columns shares a token's scale, and lies in one run. */
typedef struct {
    int8_t *codes; /* [blocks][tokens][BLOCK] */
    float *scale;  /* [spans][tokens] */
    float *sum;    /* [spans][tokens], of the codes */
    int tokens, span;
    const float *given; /* [tokens], the scale of all of a token's spans; NULL: each has its own */
} Activations;

/* Numbers as a caller has them: fp32 or bf16, row-major. */
typedef struct {
    void *data;
    int is_bf16, columns;
} Matrix;

/* An instruction set. */
typedef struct {
    /* Fills a segment, of which bits, first, columns and run are set. */
    void (*decode)(const Weight *weight, int tile, Segment *segment);
    /* Adds the segment's products to sums [tokens][ROWS]. */
    void (*multiply)(const Segment *segment, const Activations *x, float *sums);
    /* Rounds a block of columns of x, from row `begin` on. */
    void (*round)(const Matrix *x, size_t begin, int block, int bits, Activations *out);
    /* Writes sums as columns of y, from row `begin` on. */
    void (*store)(const float *sums, int tile, int tokens, size_t begin, Matrix *y);
    /* Writes the rows of a tile, densely. */
    void (*dequantize)(const Weight *weight, int tile, Matrix *out);
} Isa;

extern const Isa PORTABLE, AVX2, AVX_VNNI, AVX512_VNNI, AMX;
#ifdef HAVE_X86
void decode_avx512(const Weight *weight, int tile, Segment *segment);
#endif

INLINE int chunk_of(int bits) { return bits == 8 ? 32 : bits == 4 ? 64 : 128; }
INLINE int at_most(int a, int b) { return a < b ? a : b; }

/* Where the chunk that begins with a column lies, counted in chunks. */
INLINE size_t chunk_at(const Weight *weight, int tile, int column) {
    const int chunk = chunk_of(weight->bits);
    return (size_t)tile * (size_t)(weight->columns / chunk) + (size_t)(column / chunk);
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of_half(uint32_t half) {
    /* The multiplication makes good the difference of the exponents' biases, and is right for subnormal numbers too. */
    const float magnitude = float_of((half & 0x7fff) << 13) * 0x1p112f;
    const float finite_or_not = (half & 0x7c00) == 0x7c00 ? float_of(0x7f800000 | (half & 0x3ff) << 13) : magnitude;
    return (half & 0x8000) ? -finite_or_not : finite_or_not;
}

INLINE uint16_t bf16_of(float value) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* Of every four bytes the middle ones change places. */
INLINE uint32_t swap_middle(uint32_t four) {
    return (four & 0xff0000ff) | (four << 8 & 0x00ff0000) | (four >> 8 & 0x0000ff00);
}

/* Scales and zero points of a tile's rows in one group; words: theirs. */
INLINE void read_scales(const Weight *weight, const uint8_t *words, float *scale, float *zero) {
    const float bias = weight->bits == 8 ? 0.0f : 128.0f;
    uint32_t of_rows[ROWS];
    __builtin_prefetch(words + AHEAD_SCALES);
    memcpy(of_rows, words, sizeof of_rows);
    for (int row = 0; row < ROWS; row++) zero[row] = float_of(of_rows[row] & 0xffff0000) - bias;
    if (weight->half_floats)
        for (int row = 0; row < ROWS; row++) scale[row] = float_of_half(of_rows[row] & 0xffff);
    else
        for (int row = 0; row < ROWS; row++) scale[row] = float_of(of_rows[row] << 16);
}

/* Where the scales of a tile's rows lie, for the group that a column is in. Those of the next group follow. */
INLINE const uint8_t *scales_at(const Weight *weight, int tile, int column) {
    const int groups = weight->group ? weight->columns / weight->group : 1;
    const int group = weight->group ? column / weight->group : 0;
    return weight->scales + ((size_t)tile * (size_t)groups + (size_t)group) * (ROWS * sizeof(uint32_t));
}

INLINE void decode_scales(const Weight *weight, int tile, Segment *segment) {
    const uint8_t *words = scales_at(weight, tile, segment->first);
    for (int n = 0; n < segment->columns / segment->run; n++, words += ROWS * sizeof(uint32_t))
        read_scales(weight, words, segment->scale[n], segment->zero[n]);
}

/* Asks for what will be read a segment after a chunk, or two: processors do not foresee reading between multiplications. */
INLINE void prefetch(const Weight *weight, size_t chunk) {
    const size_t ahead = weight->bits == 8 ? 8192 : 4096;
    const uint8_t *codes = weight->codes + chunk * TILE + ahead;
    for (int line = 0; line < TILE; line += 64) __builtin_prefetch(codes + line);
    if (weight->bits != 3) return;
    const uint8_t *high = weight->high + (chunk * TILE + ahead) / 2;
    for (int line = 0; line < TILE / 2; line += 64) __builtin_prefetch(high + line);
}

#endif

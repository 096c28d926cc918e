/* Plain C, for any processor. A segment's bytes lie row by row, SEGMENT bytes each. */
#include "kernels.h"
#include "loops.h"
#include "rows.h"

static void decode(const Weight *weight, int tile, Segment *segment) {
    for (int column = 0; column < segment->columns; column += chunk_of(weight->bits))
        decode_rows(weight, tile, segment->first + column, SEGMENT, segment->codes + column);
    decode_scales(weight, tile, segment);
}

static void multiply(const Segment *segment, const Activations *x, float *sums) {
    const size_t tokens = (size_t)x->tokens;
    for (int column = 0; column < segment->columns; column += x->span) {
        const int absolute = segment->first + column, run = column / segment->run;
        const size_t at = (size_t)(absolute / x->span) * tokens;
        for (size_t m = 0; m < tokens; m++) {
            const int8_t *four = x->codes + ((size_t)(absolute / BLOCK) * tokens + m) * BLOCK + absolute % BLOCK;
            for (int row = 0; row < ROWS; row++) {
                const uint8_t *codes = segment->codes + row * SEGMENT + column;
                int32_t dot = 0;
                for (int i = 0; i < x->span; i++) dot += codes[i] * four[i];
                const float exact = (float)dot - segment->zero[run][row] * x->sum[at + m];
                sums[m * ROWS + (size_t)row] += exact * (segment->scale[run][row] * x->scale[at + m]);
            }
        }
    }
}

static void round_portable(const Matrix *x, size_t begin, int block, int bits, Activations *out) {
    round_loop(x, begin, block, bits, out);
}

static void store(const float *sums, int tile, int tokens, size_t begin, Matrix *y) {
    store_loop(sums, tile, tokens, begin, y);
}

static void dequantize(const Weight *weight, int tile, Matrix *out) { dequantize_loop(weight, tile, out); }

const Isa PORTABLE = {decode, multiply, round_portable, store, dequantize};

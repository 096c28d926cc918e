/* The loops that compilers turn into good code by themselves; each instruction set's file has its own copy of them. */
#ifndef COMPRESSOR_LOOPS_H
#define COMPRESSOR_LOOPS_H

#include "kernels.h"

/* Codes of activations, in the order in which `decode` yields those of the weight. */
INLINE void reorder(const int8_t *codes, int span, int bits, int8_t *out) {
    uint32_t words[BLOCK / 4];
    if (bits >= 4) {
        memcpy(words, codes, (size_t)span);
    } else { /* of a lane's 32 columns, first all pairs of columns with j = 0 and 1, then those with j = 2 and 3 */
        uint16_t pairs[BLOCK / 2], parted[BLOCK / 2];
        memcpy(pairs, codes, (size_t)span);
        for (int run = 0; run < span / 2; run += 16)
            for (int i = 0; i < 8; i++) {
                parted[run + i] = pairs[run + 2 * i];
                parted[run + 8 + i] = pairs[run + 2 * i + 1];
            }
        memcpy(words, parted, (size_t)span);
    }
    if (bits < 8)
        for (int i = 0; i < span / 4; i++) words[i] = swap_middle(words[i]);
    memcpy(out, words, (size_t)span);
}

/* Numbers to the nearest of 255 multiples of `scale`, with 0 in the middle. An infinity or NaN makes `scale` NaN. */
INLINE void round_span(const float *x, int span, int bits, int8_t *out, float *scale, float *sum) {
    int32_t top = 0; /* magnitudes compare as integers, and infinity and NaN are the largest */
    for (int i = 0; i < span; i++) {
        const int32_t magnitude = (int32_t)(bits_of(x[i]) & 0x7fffffff);
        top = magnitude > top ? magnitude : top;
    }
    const float largest = float_of((uint32_t)top);
    const int finite = top < 0x7f800000, tiny = largest < 0x1p-119f; /* of a tiny number 127 / largest is infinite */
    const float steps = finite && !tiny ? 127.0f / largest : 0.0f;
    int8_t codes[BLOCK];
    int32_t total = 0;
    for (int i = 0; i < span; i++) {
        const float value = finite ? x[i] * steps : 0.0f;
        codes[i] = (int8_t)bits_of(value + 0x1.8p23f); /* addition rounds to an integer, ties to even, in the lowest bits */
        total += codes[i];
    }
    reorder(codes, span, bits, out);
    *scale = finite ? largest / 127.0f : float_of(0x7fc00000);
    *sum = (float)total;
}

/* Numbers to the nearest of 256 multiples of a scale that is given: as compressor/formats/numerics/activations.py, bit for bit. */
INLINE void round_given(const float *x, int span, int bits, float scale, int8_t *out, float *sum) {
    int8_t codes[BLOCK];
    int32_t total = 0;
    for (int i = 0; i < span; i++) {
        const float steps = x[i] / scale, below = steps < 127.0f ? steps : 127.0f;
        codes[i] = (int8_t)bits_of((below > -128.0f ? below : -128.0f) + 0x1.8p23f);
        total += codes[i];
    }
    reorder(codes, span, bits, out);
    *sum = (float)total;
}

INLINE void round_loop(const Matrix *x, size_t begin, int block, int bits, Activations *out) {
    const int first = block * BLOCK, spans = BLOCK / out->span;
    for (int token = 0; token < out->tokens; token++) {
        const size_t from = (begin + (size_t)token) * (size_t)x->columns + (size_t)first;
        float values[BLOCK];
        if (x->is_bf16) {
            uint16_t halves[BLOCK];
            memcpy(halves, (const uint16_t *)x->data + from, sizeof halves);
            for (int i = 0; i < BLOCK; i++) values[i] = float_of((uint32_t)halves[i] << 16);
        } else {
            memcpy(values, (const float *)x->data + from, sizeof values);
        }
        int8_t *codes = out->codes + ((size_t)block * (size_t)out->tokens + (size_t)token) * BLOCK;
        for (int i = 0; i < spans; i++) {
            const size_t at = (size_t)(block * spans + i) * (size_t)out->tokens + (size_t)token;
            const int column = i * out->span;
            if (out->given) {
                const float scale = out->given[begin + (size_t)token];
                round_given(values + column, out->span, bits, scale, codes + column, out->sum + at);
                out->scale[at] = scale < 0x1p127f ? scale : float_of(0x7fc00000); /* not finite: then nothing is */
            } else {
                round_span(values + column, out->span, bits, codes + column, out->scale + at, out->sum + at);
            }
        }
    }
}

INLINE void store_loop(const float *sums, int tile, int tokens, size_t begin, Matrix *y) {
    const int first = tile * ROWS, count = at_most(ROWS, y->columns - first), all = tokens * ROWS;
    const size_t item = y->is_bf16 ? sizeof(uint16_t) : sizeof(float);
    uint16_t halves[TOKENS * ROWS];
    if (y->is_bf16)
        for (int i = 0; i < all; i++) halves[i] = bf16_of(sums[i]); /* in one: gcc would unroll it row by row, into scalars */
    const char *from = y->is_bf16 ? (const char *)halves : (const char *)sums;
    char *to = (char *)y->data + (begin * (size_t)y->columns + (size_t)first) * item;
    for (int m = 0; m < tokens; m++, from += ROWS * item, to += (size_t)y->columns * item)
        memcpy(to, from, (size_t)count * item);
}

#endif

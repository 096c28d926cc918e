/* Codes as bytes, row by row: for the portable product and for the dense weight. */
#ifndef COMPRESSOR_ROWS_H
#define COMPRESSOR_ROWS_H

#include "kernels.h"

/* The lines of a tile are those of its rows g: 64 bytes each, of the rows g and g + 8. */
enum { LINES = 8, LINE = 64, LANE = 16 };

/* The third bits of a word's codes: bit 2 + r of a byte belongs to the bits 2 r and 2 r + 1 of the word's byte. Of a word of
 * `high`, the bytes 0 and 2 are those of an even word, 1 and 3 of an odd one, with four bits for each of two steps. */
INLINE uint32_t third_bits(uint32_t high, int odd_word) {
    const uint32_t bytes = high >> 8 * odd_word & 0x00ff00ff;
    return bytes << 2 | bytes << 6;
}

INLINE void rows_of_8_bits(const uint8_t *line, uint8_t *low, uint8_t *high) {
    uint32_t words[16], parted[16];
    memcpy(words, line, LINE);
    for (int i = 0; i < 8; i++) {
        parted[i] = words[2 * i];
        parted[8 + i] = words[2 * i + 1];
    }
    memcpy(low, parted, LINE / 2);
    memcpy(high, parted + 8, LINE / 2);
}

INLINE void rows_of_4_bits(const uint8_t *line, uint8_t *low, uint8_t *high) {
    for (int i = 0; i < LINE; i++) {
        low[i] = line[i] & 15;
        high[i] = line[i] >> 4;
    }
}

/* third: the third bits of a line, 32 bytes, or NULL. */
INLINE void rows_of_2_bits(const uint8_t *line, const uint8_t *third, uint8_t *low, uint8_t *high) {
    uint32_t words[16], more[8] = {0}, out[4][16]; /* out: the rows g and g + 8 of columns j = 0 and 1, and of 2 and 3 */
    memcpy(words, line, LINE);
    if (third) memcpy(more, third, LINE / 2);
    for (int i = 0; i < 16; i++) {
        const uint32_t bits = third ? third_bits(more[i / 2], i % 2) : 0;
        for (int r = 0; r < 4; r++) out[r][i] = (words[i] >> 2 * r & 0x03030303) | (bits >> r & 0x04040404);
    }
    for (int t = 0; t < 4; t++)
        for (int j = 0; j < 2; j++) {
            memcpy(low + 32 * t + LANE * j, out[2 * j] + 4 * t, LANE);
            memcpy(high + 32 * t + LANE * j, out[2 * j + 1] + 4 * t, LANE);
        }
}

/* The chunk that begins with a column; rows are `stride` bytes apart. */
INLINE void decode_rows(const Weight *weight, int tile, int column, size_t stride, uint8_t *out) {
    const size_t chunk = chunk_at(weight, tile, column);
    const uint8_t *line = weight->codes + chunk * TILE;
    prefetch(weight, chunk);
    for (int g = 0; g < LINES; g++, line += LINE) {
        uint8_t *low = out + (size_t)g * stride, *high = low + LINES * stride;
        if (weight->bits == 8) rows_of_8_bits(line, low, high);
        else if (weight->bits == 4) rows_of_4_bits(line, low, high);
        else if (weight->bits == 2) rows_of_2_bits(line, NULL, low, high);
        else rows_of_2_bits(line, weight->high + chunk * (TILE / 2) + g * (LINE / 2), low, high);
    }
}

/* Undoes the order of a chunk's columns: the inverse of `reorder` in loops.h. */
INLINE void order_columns(uint8_t *codes, int bits) {
    const int chunk = chunk_of(bits);
    uint32_t words[32];
    if (bits == 8) return;
    memcpy(words, codes, (size_t)chunk);
    for (int i = 0; i < chunk / 4; i++) words[i] = swap_middle(words[i]);
    memcpy(codes, words, (size_t)chunk);
    if (bits == 4) return;
    uint16_t parted[64], pairs[64];
    memcpy(parted, codes, sizeof parted);
    for (int run = 0; run < 64; run += 16)
        for (int i = 0; i < 8; i++) {
            pairs[run + 2 * i] = parted[run + i];
            pairs[run + 2 * i + 1] = parted[run + 8 + i];
        }
    memcpy(codes, pairs, sizeof pairs);
}

/* Numbers of one row and chunk; scale and zero are of spans, ROWS apart. */
INLINE void dense_row(const uint8_t *codes, int chunk, int span, const float *scale, const float *zero, float *out) {
    for (int column = 0; column < chunk; column += span, scale += ROWS, zero += ROWS)
        for (int i = column; i < column + span; i++) out[i] = ((float)codes[i] - *zero) * *scale;
}

INLINE void dequantize_loop(const Weight *weight, int tile, Matrix *out) {
    const int chunk = chunk_of(weight->bits), rows = at_most(ROWS, weight->rows - tile * ROWS);
    const int span = weight->group ? at_most(chunk, weight->group) : chunk;
    float scale[4 * ROWS], zero[4 * ROWS], values[128];
    uint8_t codes[ROWS * 128];
    uint16_t halves[128];
    for (int first = 0; first < weight->columns; first += chunk) {
        const size_t count = (size_t)at_most(chunk, out->columns - first);
        decode_rows(weight, tile, first, 128, codes);
        for (int n = 0; n < chunk / span; n++)
            read_scales(weight, scales_at(weight, tile, first + n * span), scale + n * ROWS, zero + n * ROWS);
        for (int row = 0; row < rows; row++) {
            const size_t at = (size_t)(tile * ROWS + row) * (size_t)out->columns + (size_t)first;
            order_columns(codes + row * 128, weight->bits);
            dense_row(codes + row * 128, chunk, span, scale + row, zero + row, values);
            if (out->is_bf16) {
                for (int i = 0; i < chunk; i++) halves[i] = bf16_of(values[i]);
                memcpy((uint16_t *)out->data + at, halves, count * sizeof *halves);
            } else {
                memcpy((float *)out->data + at, values, count * sizeof *values);
            }
        }
    }
}

#endif

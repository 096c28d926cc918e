/* AVX-512 with VNNI. A segment's bytes lie as in avx2.c: [columns / 4][16 rows][4 columns]. */
#include "kernels.h"

#ifdef HAVE_X86
#include <immintrin.h>

#include "loops.h"
#include "rows.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

/* Four times four words of each lane, in registers of one word of all: out[i] holds word i of four registers' lanes. */
TARGET INLINE void transpose(const __m512i lines[4], __m512i out[4]) {
    const __m512i a = _mm512_unpacklo_epi32(lines[0], lines[1]), b = _mm512_unpackhi_epi32(lines[0], lines[1]);
    const __m512i c = _mm512_unpacklo_epi32(lines[2], lines[3]), d = _mm512_unpackhi_epi32(lines[2], lines[3]);
    out[0] = _mm512_unpacklo_epi64(a, c);
    out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d);
    out[3] = _mm512_unpackhi_epi64(b, d);
}

/* A tile of codes: word i of the lanes t of rows 0 to 3 in out[0][i], of rows 4 to 7 in out[1][i]. */
TARGET INLINE void read_tile(const uint8_t *tile, __m512i out[2][4]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512i lines[4];
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) lines[g] = _mm512_loadu_si512(tile + 64 * (4 * half + g));
        transpose(lines, out[half]);
    }
}

/* A word of the lanes t of the rows g, twice: the second is for rows g + 8. */
TARGET INLINE __m512i twice(__m512i low, __m512i high, int t) {
    const __m512i lane = _mm512_set_epi64(9, 8, 1, 0, 9, 8, 1, 0);
    return _mm512_permutex2var_epi64(low, _mm512_add_epi64(lane, _mm512_set1_epi64(2 * t)), high);
}

/* Shifts a word by so many bits for the rows g, and by `more` for the rows g + 8. */
TARGET INLINE __m512i shift(__m512i words, int bits, int more) {
    return _mm512_srlv_epi32(words, _mm512_mask_set1_epi32(_mm512_set1_epi32(bits), 0xff00, bits + more));
}

/* A tile of 64 columns of 4 bits, or of 32 of 8. */
TARGET INLINE void decode_bytes(const uint8_t *tile, int bits, uint8_t *out) {
    __m512i words[2][4];
    read_tile(tile, words);
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++)
        if (bits == 8) {
#pragma GCC unroll 2
            for (int s = 0; s < 2; s++) {
                const __m512i low = twice(words[0][2 * s], words[1][2 * s], t);
                const __m512i high = twice(words[0][2 * s + 1], words[1][2 * s + 1], t);
                _mm512_store_si512(out + 64 * (2 * t + s), _mm512_mask_blend_epi32(0xff00, low, high));
            }
        } else {
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                const __m512i nibbles = shift(twice(words[0][s], words[1][s], t), 0, 4);
                _mm512_store_si512(out + 64 * (4 * t + s), _mm512_and_si512(nibbles, _mm512_set1_epi8(15)));
            }
        }
}

/* The third bits of a tile's codes: word i of lanes t = 2 j and 2 j + 1, for rows 0 to 3 and 4 to 7, j being the lane. */
TARGET INLINE void read_high(const uint8_t *high, __m512i out[4]) {
    __m512i lines[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
        const __m256i first = _mm256_loadu_si256((const void *)(high + 32 * g));
        const __m256i second = _mm256_loadu_si256((const void *)(high + 32 * (g + 4)));
        lines[g] = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    }
    transpose(lines, out);
}

/* As `third_bits` of rows.h, for the lanes t, and twice. */
TARGET INLINE __m512i third_bits_512(__m512i high, int t, int odd_word) {
    const __m512i lane = _mm512_set_epi64(5, 4, 1, 0, 5, 4, 1, 0);
    const __m512i both = _mm512_permutexvar_epi64(_mm512_add_epi64(lane, _mm512_set1_epi64(2 * (t / 2))), high);
    const __m512i bytes = _mm512_and_si512(_mm512_srli_epi32(both, 8 * odd_word), _mm512_set1_epi32(0x00ff00ff));
    return _mm512_or_si512(_mm512_slli_epi32(bytes, 2), _mm512_slli_epi32(bytes, 6));
}

/* A tile of 128 columns of 2 bits, or of 3 with the third apart. */
TARGET INLINE void decode_pairs(const uint8_t *tile, const uint8_t *high, uint8_t *out) {
    __m512i words[2][4], more[4];
    read_tile(tile, words);
    if (high) read_high(high, more);
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512i word = twice(words[0][i], words[1][i], t);
            const __m512i third = high ? third_bits_512(more[2 * (t % 2) + i / 2], t, i % 2) : word;
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                __m512i bytes = _mm512_and_si512(shift(word, 4 * j, 2), _mm512_set1_epi8(3));
                if (high) /* bytes | third & 4 */
                    bytes = _mm512_ternarylogic_epi32(bytes, shift(third, 2 * j, 1), _mm512_set1_epi8(4), 0xf8);
                _mm512_store_si512(out + 64 * (8 * t + 4 * j + i), bytes);
            }
        }
}

TARGET void decode_avx512(const Weight *weight, int tile, Segment *segment) {
    const int bits = weight->bits, chunk = chunk_of(bits);
    size_t at = chunk_at(weight, tile, segment->first);
    for (int column = 0; column < segment->columns; column += chunk, at++) {
        const uint8_t *codes = weight->codes + at * TILE;
        uint8_t *bytes = segment->codes + column * ROWS;
        prefetch(weight, at);
        if (bits == 4) decode_bytes(codes, 4, bytes);
        else if (bits == 8) decode_bytes(codes, 8, bytes);
        else if (bits == 2) decode_pairs(codes, NULL, bytes);
        else decode_pairs(codes, weight->high + at * (TILE / 2), bytes);
    }
    decode_scales(weight, tile, segment);
}

/* Adds products of four codes of each row with four activations. The intrinsic will not do: gcc copies every sum for it. */
TARGET INLINE void add_products(__m512i *sum, __m512i rows, const int8_t *four) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(rows), "m"(*(const int8_t(*)[4])four));
}

/* T tokens, whose sums are all in registers. Few tokens have several each: additions need not wait for one another. */
TARGET INLINE void multiply_tokens(const Segment *segment, const Activations *x, size_t m, const int T, const int CHAINS,
                                   const int span, float *sums) {
    const size_t tokens = (size_t)x->tokens, first_span = (size_t)(segment->first / span);
    const float *x_scale = x->scale + first_span * tokens + m, *x_sum = x->sum + first_span * tokens + m;
    for (int begin = 0, n = 0; begin < segment->columns; begin += segment->run, n++) {
        const __m512 scale = _mm512_load_ps(segment->scale[n]), zero = _mm512_load_ps(segment->zero[n]);
        __m512 products[16];
#pragma GCC unroll 16
        for (int i = 0; i < T; i++) products[i] = _mm512_setzero_ps();
        for (int column = begin; column < begin + segment->run; column += span, x_scale += tokens, x_sum += tokens) {
            const int absolute = segment->first + column;
            const int8_t *codes = x->codes + ((size_t)(absolute / BLOCK) * tokens + m) * BLOCK + absolute % BLOCK;
            __m512i dot[16];
#pragma GCC unroll 16
            for (int i = 0; i < T * CHAINS; i++) dot[i] = _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int q = 0; q < span / 4; q++) {
                const __m512i rows = _mm512_load_si512(segment->codes + column * ROWS + 64 * q);
#pragma GCC unroll 16
                for (int i = 0; i < T; i++) add_products(&dot[T * (q % CHAINS) + i], rows, codes + BLOCK * i + 4 * q);
            }
#pragma GCC unroll 16
            for (int i = 0; i < T; i++) {
#pragma GCC unroll 4
                for (int c = 1; c < CHAINS; c++) dot[i] = _mm512_add_epi32(dot[i], dot[T * c + i]);
                const __m512 exact = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x_sum[i]), _mm512_cvtepi32_ps(dot[i]));
                products[i] = _mm512_fmadd_ps(exact, _mm512_set1_ps(x_scale[i]), products[i]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < T; i++)
            _mm512_store_ps(sums + ROWS * i, _mm512_fmadd_ps(products[i], scale, _mm512_load_ps(sums + ROWS * i)));
    }
}

#define TAKE(T, CHAINS)                                                                          \
    for (; tokens - m >= T; m += T, sums += T * ROWS) {                                          \
        if (x->span == BLOCK) multiply_tokens(segment, x, m, T, CHAINS, BLOCK, sums);            \
        else multiply_tokens(segment, x, m, T, 1, x->span, sums);                                \
    }

TARGET static void multiply(const Segment *segment, const Activations *x, float *sums) {
    const size_t tokens = (size_t)x->tokens;
    size_t m = 0;
    TAKE(16, 1)
    TAKE(8, 1)
    TAKE(4, 2)
    TAKE(2, 4)
    TAKE(1, 4)
}

TARGET void round_avx512(const Matrix *x, size_t begin, int block, int bits, Activations *out) {
    round_loop(x, begin, block, bits, out);
}

TARGET void store_avx512(const float *sums, int tile, int tokens, size_t begin, Matrix *y) {
    store_loop(sums, tile, tokens, begin, y);
}

TARGET void dequantize_avx512(const Weight *weight, int tile, Matrix *out) { dequantize_loop(weight, tile, out); }

const Isa AVX512_VNNI = {decode_avx512, multiply, round_avx512, store_avx512, dequantize_avx512};
#endif

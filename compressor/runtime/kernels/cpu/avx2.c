/* AVX2: decoding, and multiplication with 256-bit registers, by `vpdpbusd` where there is AVX-VNNI, else by `vpmaddubsw`.
 *
 * A segment's bytes lie as [columns / 4][16 rows][4 columns], so that four activations, broadcast, meet 16 rows at once and
 * sums need not be collected across a register.
 */
#include "kernels.h"

#ifdef HAVE_X86
#include <immintrin.h>

#include "loops.h"
#include "rows.h"

#define TARGET __attribute__((target("avx2,fma")))

/* Words [8 lanes][4] at a distance, as four registers of one word of each lane. */
TARGET INLINE void transpose(const uint8_t *words, size_t distance, __m256i out[4]) {
    __m256i lanes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m128i low = _mm_loadu_si128((const void *)(words + distance * i));
        const __m128i high = _mm_loadu_si128((const void *)(words + distance * (i + 4)));
        lanes[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    const __m256i a = _mm256_unpacklo_epi32(lanes[0], lanes[1]), b = _mm256_unpackhi_epi32(lanes[0], lanes[1]);
    const __m256i c = _mm256_unpacklo_epi32(lanes[2], lanes[3]), d = _mm256_unpackhi_epi32(lanes[2], lanes[3]);
    out[0] = _mm256_unpacklo_epi64(a, c);
    out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d);
    out[3] = _mm256_unpackhi_epi64(b, d);
}

TARGET INLINE void put(uint8_t *out, int half, __m256i bytes) { _mm256_store_si256((__m256i *)(out + 32 * half), bytes); }

/* A tile of 64 columns of 4 bits, or of 32 of 8. */
TARGET INLINE void decode_bytes(const uint8_t *tile, int bits, uint8_t *out) {
    const __m256i mask = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
        __m256i words[4];
        transpose(tile + 16 * t, 64, words);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            if (bits == 8) {
                put(out + 64 * (2 * t + i / 2), i % 2, words[i]);
            } else {
                put(out + 64 * (4 * t + i), 0, _mm256_and_si256(words[i], mask));
                put(out + 64 * (4 * t + i), 1, _mm256_and_si256(_mm256_srli_epi32(words[i], 4), mask));
            }
        }
    }
}

/* As `third_bits` of rows.h. */
TARGET INLINE __m256i third_bits_256(__m256i high, int odd_word) {
    const __m256i bytes = _mm256_and_si256(_mm256_srli_epi32(high, 8 * odd_word), _mm256_set1_epi32(0x00ff00ff));
    return _mm256_or_si256(_mm256_slli_epi32(bytes, 2), _mm256_slli_epi32(bytes, 6));
}

/* A tile of 128 columns of 2 bits, or of 3 with the third apart. */
TARGET INLINE void decode_pairs(const uint8_t *tile, const uint8_t *high, uint8_t *out) {
    const __m256i two = _mm256_set1_epi8(3), third = _mm256_set1_epi8(4);
    __m256i words[4], more[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
        transpose(tile + 16 * t, 64, words);
        if (high && t % 2 == 0) transpose(high + 8 * t, 32, more);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m256i bits = _mm256_setzero_si256();
            if (high) bits = third_bits_256(more[2 * (t % 2) + i / 2], i % 2);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) { /* registers: row g, row g + 8, and both for j = 2 and 3 */
                __m256i bytes = _mm256_and_si256(_mm256_srli_epi32(words[i], 2 * r), two);
                if (high) bytes = _mm256_or_si256(bytes, _mm256_and_si256(_mm256_srli_epi32(bits, r), third));
                put(out + 64 * (8 * t + 4 * (r / 2) + i), r % 2, bytes);
            }
        }
    }
}

TARGET static void decode(const Weight *weight, int tile, Segment *segment) {
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

TARGET INLINE __m256i broadcast(const int8_t *four) {
    int32_t word;
    memcpy(&word, four, sizeof word);
    return _mm256_set1_epi32(word);
}

/* How products of bytes are summed. */
enum { BY_VNNI, BY_PAIRS, BY_NIBBLES };

/* Products over one span, as the exact integers they are: of T tokens and eight rows each, dot[2 * token + half]. */
TARGET INLINE void dot_vnni(const uint8_t *rows, const int8_t *codes, int quads, const int T, __m256i *dot) {
    for (int q = 0; q < quads; q++) {
        const __m256i low = _mm256_load_si256((const void *)(rows + 64 * q));
        const __m256i high = _mm256_load_si256((const void *)(rows + 64 * q + 32));
#pragma GCC unroll 4
        for (int i = 0; i < T; i++) {
            const __m256i four = broadcast(codes + BLOCK * i + 4 * q);
            __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(dot[2 * i]) : "x"(low), "x"(four));
            __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(dot[2 * i + 1]) : "x"(high), "x"(four));
        }
    }
}

/* The same without VNNI, for codes below 16: their pairs of products sum to 3840 at most, eight of which fit into 16 bits. */
TARGET INLINE void dot_pairs(const uint8_t *rows, const int8_t *codes, int quads, int shift, const int T, __m256i *dot) {
    const __m256i mask = _mm256_set1_epi8(15), unit = _mm256_set1_epi16((short)(1 << shift));
    __m256i pairs[8];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * T; i++) pairs[i] = _mm256_setzero_si256();
    for (int q = 0; q < quads; q++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m256i bytes = _mm256_load_si256((const void *)(rows + 64 * q + 32 * half));
            const __m256i nibbles = _mm256_and_si256(_mm256_srli_epi16(bytes, shift), mask);
#pragma GCC unroll 4
            for (int i = 0; i < T; i++) {
                const __m256i two = _mm256_maddubs_epi16(nibbles, broadcast(codes + BLOCK * i + 4 * q));
                pairs[2 * i + half] = _mm256_add_epi16(pairs[2 * i + half], two);
            }
        }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * T; i++) dot[i] = _mm256_add_epi32(dot[i], _mm256_madd_epi16(pairs[i], unit));
}

_Static_assert(BLOCK / 4 <= 8, "sums of more than eight pairs do not fit into 16 bits");

TARGET INLINE void multiply_tokens(const Segment *segment, const Activations *x, size_t m, const int T, const int how,
                                   float *sums) {
    const size_t tokens = (size_t)x->tokens, first_span = (size_t)(segment->first / x->span);
    const float *x_scale = x->scale + first_span * tokens + m, *x_sum = x->sum + first_span * tokens + m;
    for (int column = 0; column < segment->columns; column += x->span, x_scale += tokens, x_sum += tokens) {
        const int absolute = segment->first + column, run = column / segment->run, quads = x->span / 4;
        const int8_t *codes = x->codes + ((size_t)(absolute / BLOCK) * tokens + m) * BLOCK + absolute % BLOCK;
        const uint8_t *rows = segment->codes + column * ROWS;
        __m256i dot[8];
#pragma GCC unroll 8
        for (int i = 0; i < 2 * T; i++) dot[i] = _mm256_setzero_si256();
        if (how == BY_VNNI) dot_vnni(rows, codes, quads, T, dot);
        else dot_pairs(rows, codes, quads, 0, T, dot);
        if (how == BY_NIBBLES) dot_pairs(rows, codes, quads, 4, T, dot);
#pragma GCC unroll 8
        for (int i = 0; i < 2 * T; i++) {
            const __m256 scale = _mm256_load_ps(segment->scale[run] + 8 * (i % 2));
            const __m256 zero = _mm256_load_ps(segment->zero[run] + 8 * (i % 2));
            const __m256 exact = _mm256_fnmadd_ps(zero, _mm256_set1_ps(x_sum[i / 2]), _mm256_cvtepi32_ps(dot[i]));
            const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x_scale[i / 2]));
            _mm256_store_ps(sums + 8 * i, _mm256_fmadd_ps(exact, both, _mm256_load_ps(sums + 8 * i)));
        }
        __asm__ volatile("" ::: "memory"); /* else the totals take the registers of the sums */
    }
}

TARGET INLINE void multiply(const Segment *segment, const Activations *x, const int how, float *sums) {
    const size_t tokens = (size_t)x->tokens;
    size_t m = 0;
    for (; tokens - m >= 4; m += 4) multiply_tokens(segment, x, m, 4, how, sums + m * ROWS);
    for (; tokens - m >= 2; m += 2) multiply_tokens(segment, x, m, 2, how, sums + m * ROWS);
    for (; tokens - m >= 1; m += 1) multiply_tokens(segment, x, m, 1, how, sums + m * ROWS);
}

TARGET static void multiply_avx2(const Segment *segment, const Activations *x, float *sums) {
    if (segment->bits == 8) multiply(segment, x, BY_NIBBLES, sums);
    else multiply(segment, x, BY_PAIRS, sums);
}

TARGET static void round_avx2(const Matrix *x, size_t begin, int block, int bits, Activations *out) {
    round_loop(x, begin, block, bits, out);
}

TARGET static void store(const float *sums, int tile, int tokens, size_t begin, Matrix *y) {
    store_loop(sums, tile, tokens, begin, y);
}

TARGET static void dequantize(const Weight *weight, int tile, Matrix *out) { dequantize_loop(weight, tile, out); }

const Isa AVX2 = {decode, multiply_avx2, round_avx2, store, dequantize};

#ifdef HAVE_AVX_VNNI
TARGET static void multiply_avx_vnni(const Segment *segment, const Activations *x, float *sums) {
    multiply(segment, x, BY_VNNI, sums);
}

const Isa AVX_VNNI = {decode, multiply_avx_vnni, round_avx2, store, dequantize};
#endif
#endif

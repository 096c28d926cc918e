/* AMX: products of 16 tokens, 32 columns and 16 rows by one instruction; all else is AVX-512's.
 *
 * What `decode_avx512` leaves, [columns / 4][16 rows][4 columns], is what the instruction wants of its second operand, and
 * activations lie as it wants the first. Tests put a header in the place of the instructions (COMPRESSOR_TILES).
 */
#include "kernels.h"

#if defined(HAVE_AMX) || defined(COMPRESSOR_TILES)
#include <immintrin.h>

#include "loops.h"
#include "rows.h"

#ifdef COMPRESSOR_TILES
#include COMPRESSOR_TILES
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8")))
#endif

/* Tiles: 0 the sums [tokens][16 rows], 1 activations [tokens][columns], 2 the weight [columns / 4][16 rows][4 columns]. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

TARGET static void configure(int tokens, int span) {
    TileConfig config = {.palette = 1};
    const int rows[] = {tokens, tokens, span / 4}, row_bytes[] = {4 * ROWS, span, 4 * ROWS};
    for (int i = 0; i < 3; i++) {
        config.rows[i] = (uint8_t)rows[i];
        config.row_bytes[i] = (uint16_t)row_bytes[i];
    }
    _tile_loadconfig(&config);
}

TARGET static void multiply_tokens(const Segment *segment, const Activations *x, size_t m, int count, float *sums) {
    const size_t tokens = (size_t)x->tokens;
    _Alignas(64) int32_t dot[16][ROWS];
    configure(count, x->span);
    for (int column = 0; column < segment->columns; column += x->span) {
        const int absolute = segment->first + column, run = column / segment->run;
        const int8_t *codes = x->codes + ((size_t)(absolute / BLOCK) * tokens + m) * BLOCK + absolute % BLOCK;
        _tile_zero(0);
        _tile_loadd(1, codes, BLOCK);
        _tile_loadd(2, segment->codes + column * ROWS, 4 * ROWS);
        _tile_dpbsud(0, 1, 2);
        _tile_stored(0, dot, 4 * ROWS);
        const __m512 scale = _mm512_load_ps(segment->scale[run]), zero = _mm512_load_ps(segment->zero[run]);
        const float *x_scale = x->scale + (size_t)(absolute / x->span) * tokens + m;
        const float *x_sum = x->sum + (size_t)(absolute / x->span) * tokens + m;
        for (int i = 0; i < count; i++) {
            const __m512 number = _mm512_cvtepi32_ps(_mm512_load_si512(dot[i]));
            const __m512 exact = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x_sum[i]), number);
            const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scale[i]));
            _mm512_store_ps(sums + ROWS * i, _mm512_fmadd_ps(exact, both, _mm512_load_ps(sums + ROWS * i)));
        }
    }
    _tile_release();
}

TARGET static void multiply(const Segment *segment, const Activations *x, float *sums) {
    for (int m = 0; m < x->tokens; m += 16)
        multiply_tokens(segment, x, (size_t)m, at_most(16, x->tokens - m), sums + m * ROWS);
}

TARGET static void round_amx(const Matrix *x, size_t begin, int block, int bits, Activations *out) {
    round_loop(x, begin, block, bits, out);
}

TARGET static void store(const float *sums, int tile, int tokens, size_t begin, Matrix *y) {
    store_loop(sums, tile, tokens, begin, y);
}

TARGET static void dequantize(const Weight *weight, int tile, Matrix *out) { dequantize_loop(weight, tile, out); }

const Isa AMX = {decode_avx512, multiply, round_amx, store, dequantize};
#endif

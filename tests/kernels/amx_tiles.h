/* Stands in for the tile instructions of AMX, on processors that have none: what the manual says they do, and no faster. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbsud emulated_dpbsud

static _Thread_local struct {
    int rows[8], row_bytes[8];
    uint8_t data[8][16][64];
} tiles;

static void emulated_release(void) { memset(&tiles, 0, sizeof tiles); }

static void emulated_loadconfig(const void *config) {
    const uint8_t *bytes = config;
    emulated_release();
    if (bytes[0] != 1) abort();
    for (int i = 0; i < 8; i++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
        tiles.rows[i] = bytes[48 + i];
        tiles.row_bytes[i] = row_bytes;
        if (tiles.rows[i] > 16 || row_bytes > 64 || row_bytes % 4) abort();
    }
}

/* An instruction that names a tile of no size is an error to the processor, too. */
static void emulated_zero(int tile) {
    if (!tiles.rows[tile]) abort();
    memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

static void emulated_loadd(int tile, const void *base, long stride) {
    emulated_zero(tile);
    for (int row = 0; row < tiles.rows[tile]; row++)
        memcpy(tiles.data[tile][row], (const uint8_t *)base + row * stride, (size_t)tiles.row_bytes[tile]);
}

static void emulated_stored(int tile, void *base, long stride) {
    if (!tiles.rows[tile]) abort();
    for (int row = 0; row < tiles.rows[tile]; row++)
        memcpy((uint8_t *)base + row * stride, tiles.data[tile][row], (size_t)tiles.row_bytes[tile]);
}

/* Sums of four products of signed bytes of a with unsigned bytes of b. */
static void emulated_dpbsud(int out, int a, int b) {
    if (tiles.rows[out] != tiles.rows[a] || tiles.row_bytes[out] != tiles.row_bytes[b]) abort();
    if (tiles.row_bytes[a] != 4 * tiles.rows[b]) abort();
    for (int m = 0; m < tiles.rows[out]; m++)
        for (int n = 0; n < tiles.row_bytes[out] / 4; n++) {
            int32_t sum;
            memcpy(&sum, &tiles.data[out][m][4 * n], 4);
            for (int k = 0; k < tiles.row_bytes[a]; k++)
                sum += (int8_t)tiles.data[a][m][k] * tiles.data[b][k / 4][4 * n + k % 4];
            memcpy(&tiles.data[out][m][4 * n], &sum, 4);
        }
}

// Planes of signs: see layouts/signs.py for how they lie. After linear.cuh.
//
// A plane's term of a weight is its scale with the sign flipped or not, which is a bf16 and needs no arithmetic.

template <int PLANES>
struct Signs : DecoderDefaults {
  static constexpr int CHUNK = 256, TERMS = PLANES;
  Words4 negative[PLANES];
  u32 scale[PLANES];  // of row g, above it that of row g + 8

  DEVICE void load(const Parts& parts, int tile_row, int chunk, int lane) {
    const Words4* signs = (const Words4*)parts.part[0] + (first_lane(parts, tile_row, chunk, CHUNK) * PLANES + lane);
    const u32 group = tile_row * groups_of_row(parts) + group_of(parts, chunk * CHUNK + lane % 4 * (CHUNK / 4));
    const u32* scales = (const u32*)parts.part[1] + (8 * PLANES * group + lane / 4);
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      negative[plane] = load_once16(signs + 32 * plane);
      scale[plane] = load_constant4(scales + 8 * plane);
    }
  }

  DEVICE void fragment(int term, u32 (&a)[4]) const {
    const int step = term / PLANES, plane = term % PLANES;
    const u32 of_row[2] = {both_halves(scale[plane]), permute_bytes(scale[plane], 0, 0x3232)};
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = of_row[i % 2] ^ (negative[plane].word[step / 4] << (15 - i - step % 4 * 4) & MINUS_ZEROS);
  }
};

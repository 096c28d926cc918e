// Integers with groups of output channels for each input channel: see layouts/input_groups.py for how they lie. After
// int_groups.cuh.
//
// The scale belongs to a column, so it cannot wait for the sums: it goes to the activation, which is rounded to bf16 again.
// The zero point is subtracted from the code and so meets the same rounded product; taken from the unrounded one instead, in
// the epilogue, it would triple the error.
//
// The scales and zero points of a run are in the ring: CHUNK / 4 registers a tile, hence small PF.

template <int BITS>
struct InputGroups : DecoderDefaults {
  static constexpr int CHUNK = BITS == 8 ? 32 : BITS == 4 ? 64 : 128;
  static constexpr int LOADS = CHUNK / 32;  // of eight columns
  Words4 codes;
  Words2 high;  // 3 bits only
  Words4 column_scales[LOADS], zeros[LOADS];

  DEVICE void load(const Parts& parts, int tile_row, int chunk, int lane) {
    const u64 at = first_lane(parts, tile_row, chunk, CHUNK) + lane;
    codes = load_once16((const Words4*)parts.part[0] + at);
    if (BITS == 3) high = load_once8((const Words2*)parts.part[1] + at);
    const u32 column = group_of(parts, 16 * tile_row) * parts.columns + chunk * CHUNK + lane % 4 * (CHUNK / 4);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      column_scales[i] = load_constant16((const u16*)parts.part[BITS == 3 ? 2 : 1] + column + 8 * i);
      zeros[i] = load_constant16((const u16*)parts.part[BITS == 3 ? 3 : 2] + column + 8 * i);
    }
  }

  DEVICE void fragment(int step, u32 (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = difference(step, i);
  }

  DEVICE u32 activation(int pair, u32 x) const { return multiply_bf16x2(x, column_scales[pair / 4].word[pair % 4]); }

 private:
  // q - z, two columns of register i.
  DEVICE u32 difference(int step, int i) const {
    const int pair = 2 * step + i / 2, p = step % 2 * 4 + i;
    const u32 zero = zeros[pair / 4].word[pair % 4];
    if (BITS == 8) {
      const float even = ABOVE_BYTE + bf16_to_float(zero), odd = ABOVE_BYTE + high_bf16_to_float(zero);
      return difference8(codes.word[2 * step + i % 2], i / 2 * 2, even, odd);
    }
    if (BITS == 4) return subtract_bf16x2(biased4(codes.word[step], i), zero);
    const u32 low = biased2(codes.word[step / 2], p);
    return unbiased2(BITS == 3 ? with_third_bit(low, high.word[step / 4], step % 4 * 4 + i, p) : low, zero ^ MINUS_ZEROS, p);
  }
};

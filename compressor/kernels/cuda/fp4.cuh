// E2M1 numbers with E4M3, E8M0 or bf16 scales: see layouts/fp4.py for how they lie. After linear.cuh.
//
// The sign goes to bit 15 of a bf16 and the other three bits to the lowest two of its exponent and the highest of its
// mantissa: that is the number times 2^-126, with 0.5 a subnormal, and is brought back by the multiplication with the scale.
// A lane's run has one scale per row. A product has at most six significant bits, so nothing is rounded; it is 2^-8 of what it
// ought to be, for then scales of up to 2^9 fit into bf16, and 2^8 joins the weight's factor, which is applied to the sums.

constexpr int E4M3 = 0, E8M0 = 1, OF_ROW = 2;

// Register i of a step: numbers times 2^-126.
DEVICE u32 small_e2m1(u32 word, int i) {
  const u32 rest = i == 0 ? word << 6 : i == 1 ? word << 2 : word >> (4 * i - 6);
  return and_or(word << (12 - 4 * i), 0x80008000u, rest & 0x01c001c0u);
}

// Scales times 2^118, twice. E4M3: where it lies in the bf16 it is 2^-120 of itself.
DEVICE u32 large_e4m3(u32 byte) {
  const u32 small = both_halves(and_or(byte << 8, 0x8000u, (byte & 0x7fu) << 4));
  return multiply_bf16x2(multiply_bf16x2(small, 0x7b807b80u), 0x7a807a80u);  // 2^120, 2^118
}
DEVICE u32 large_e8m0(u32 byte) { return both_halves((byte + 118u) << 7); }

template <int SCALE>
struct Fp4 : DecoderDefaults {
  static constexpr int CHUNK = 64;
  Words4 codes;
  u32 row_scales[2];  // OF_ROW: of rows g and g + 8; else both are bytes of the first
  u32 factor;

  DEVICE void load(const Parts& parts, int tile_row, int chunk, int lane) {
    const u64 first = first_lane(parts, tile_row, chunk, CHUNK);
    codes = load_once16((const Words4*)parts.part[0] + (first + lane));
    const u16* scales = (const u16*)parts.part[1];
    if (SCALE == E4M3) row_scales[0] = load_constant2(scales + (first + lane));
    if (SCALE == E8M0) row_scales[0] = load_constant2(scales + (first + lane) / 2);
    if (SCALE == OF_ROW) {
      row_scales[0] = load_constant2(scales + 16 * tile_row + lane / 4);
      row_scales[1] = load_constant2(scales + 16 * tile_row + lane / 4 + 8);
    }
    factor = load_constant4(parts.part[2]);
  }

  DEVICE void fragment(int step, u32 (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = multiply_bf16x2(small_e2m1(codes.word[step], i), multiplier(i % 2));
  }

  DEVICE void scales(float& s0, float& s1) const {
    const float whole = bits_to_float(factor);
    s0 = SCALE == OF_ROW ? whole * bf16_to_float(row_scales[0]) : 256.f * whole;
    s1 = SCALE == OF_ROW ? whole * bf16_to_float(row_scales[1]) : 256.f * whole;
  }

 private:
  DEVICE u32 multiplier(int row) const {
    const u32 byte = row_scales[0] >> 8 * row & 0xffu;
    return SCALE == E4M3 ? large_e4m3(byte) : SCALE == E8M0 ? large_e8m0(byte) : 0x7e807e80u;  // 2^126
  }
};

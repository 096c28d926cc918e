// Floating-point numbers of up to 4 or up to 8 bits: see layouts/floats.py for how they lie. After linear.cuh.
//
// The sign goes to bit 15 of a bf16, exponent and mantissa to where the mantissa fits: that is the number times
// 2^(bias - 127), its subnormals being subnormals, and a multiplication brings it back exactly. Where a scale belongs to a whole
// chunk it comes on the sums, in fp32. Where it belongs to less, it is part of that multiplication; a lane's run has one per row.
//
// E2M1 times E4M3 or E8M0 has at most six significant bits, so nothing is rounded; the product is 2^-8 of what it ought to be,
// for then scales of up to 2^9 fit into bf16, and 2^8 comes on the sums. The product with a real scale is rounded to bf16.

constexpr int E4M3 = 0, E8M0 = 1, BF16 = 2, FP16 = 3, FP32 = 4;

// 2^exponent as a bf16, twice.
constexpr DEVICE u32 powers_of_two(int exponent) { return (u32)(127 + exponent) << 7 | (u32)(127 + exponent) << 23; }

// Scales times 2^exponent, twice. E4M3: where it lies in the bf16 it is 2^-120 of itself.
DEVICE u32 large_e4m3(u32 byte, int exponent) {
  const u32 small = both_halves(and_or(byte << 8, 0x8000u, (byte & 0x7fu) << 4));
  return multiply_bf16x2(multiply_bf16x2(small, powers_of_two(120)), powers_of_two(exponent));
}
DEVICE u32 large_e8m0(u32 byte, int exponent) { return both_halves((byte + exponent) << 7); }
DEVICE float power_e8m0(u32 byte) { return bits_to_float(byte ? byte << 23 : 0x400000u); }

// The numbers of a tile, E bits of exponent and M of mantissa, times 2^-UP.
template <int E, int M>
struct Small {
  static constexpr int BITS = E + M <= 3 ? 4 : 8, UP = 128 - (1 << (E - 1));
  static constexpr u32 MASK = ((1u << (E + M)) - 1) << (7 - M), BOTH = MASK | MASK << 16;

  // Register i of a step.
  static DEVICE u32 pair(const Words4& codes, int step, int i) {
    if (BITS == 8) {
      const u32 low = i / 2 * 2, code = permute_bytes(codes.word[2 * step + i % 2], 0, 0x1404 + 0x1010 * low);
      return and_or(code, 0x80008000u, code >> (1 + M) & BOTH);
    }
    const int up = 7 - M - 4 * i;
    const u32 word = codes.word[step], rest = up > 0 ? word << up : word >> -up;
    return and_or(word << (12 - 4 * i), 0x80008000u, rest & BOTH);
  }
};

// INNER: a real scale belongs to less than a chunk.
template <int E, int M, int SCALE, int INNER = 0>
struct Floats : DecoderDefaults {
  static constexpr int BITS = Small<E, M>::BITS, UP = Small<E, M>::UP, CHUNK = BITS == 8 ? 32 : 64;
  static constexpr int LANES = SCALE == E4M3 ? 1 : BITS == 8 ? 4 : 2;  // that share a byte
  static constexpr bool REAL = SCALE >= BF16, ON_SUMS = REAL ? !INNER : BITS == 8;
  Words4 codes;
  u32 row_scales[2];  // of rows g and g + 8; where they are bytes, both are in the first
  u32 factor;

  DEVICE void load(const Parts& parts, int tile_row, int chunk, int lane) {
    const u64 first = first_lane(parts, tile_row, chunk, CHUNK);
    codes = load_once16((const Words4*)parts.part[0] + (first + lane));
    if (REAL) {
      const int column = chunk * CHUNK + (INNER ? lane % 4 * (CHUNK / 4) : 0);
      const u32 at = 16 * (tile_row * groups_of_row(parts) + group_of(parts, column)) + lane / 4;
      row_scales[0] = load_real(parts.part[1], at);
      row_scales[1] = load_real(parts.part[1], at + 8);
    } else {
      row_scales[0] = load_constant2((const u16*)parts.part[1] + (first + lane) / LANES);
    }
    if (SCALE == E4M3) factor = load_constant4(parts.part[2]);
  }

  DEVICE void fragment(int step, u32 (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 small = Small<E, M>::pair(codes, step, i);
      if (ON_SUMS || REAL) {
        a[i] = multiply_bf16x2(small, powers_of_two(UP));
        if (!ON_SUMS) a[i] = multiply_bf16x2(a[i], pack_bf16x2(real(i % 2), real(i % 2)));
      } else {
        a[i] = multiply_bf16x2(small, SCALE == E4M3 ? large_e4m3(byte(i % 2), UP - 8) : large_e8m0(byte(i % 2), UP - 8));
      }
    }
  }

  DEVICE void scales(float& s0, float& s1) const {
    if (!ON_SUMS) {
      s0 = s1 = REAL ? 1.f : SCALE == E4M3 ? 256.f * bits_to_float(factor) : 256.f;
      return;
    }
    s0 = REAL ? real(0) : power_e8m0(byte(0));
    s1 = REAL ? real(1) : power_e8m0(byte(1));
  }

 private:
  static DEVICE u32 load_real(const void* scales, u32 at) {
    return SCALE == FP32 ? load_constant4((const u32*)scales + at) : load_constant2((const u16*)scales + at);
  }
  DEVICE u32 byte(int row) const { return row_scales[0] >> 8 * row & 0xffu; }
  DEVICE float real(int row) const {
    const u32 bits = row_scales[row];
    return SCALE == FP32 ? bits_to_float(bits) : SCALE == FP16 ? half_to_float((u16)bits) : bf16_to_float(bits);
  }
};

// Integers of 2, 3, 4 and 8 bits in groups of input channels: see layouts/int_groups.py for how they lie. After linear.cuh.
//
// An integer q below 128 becomes a bf16 without conversion: bits 0x4300 | q are 128 + q. The zero point is stored as 128 + z,
// their difference is exact, and so are the products with the activations; the scale comes once, in fp32, on the sums.

constexpr u32 BIAS_128 = 0x43004300u;  // bf16 128, twice

// Register i of a step's fragment, of 4 bits: 128 + q.
DEVICE u32 biased4(u32 word, int i) { return and_or(word >> 4 * i, 0x000f000fu, BIAS_128); }

// Of 2 bits, pair p of a word (p = i, or 4 + i for the odd step): 128 + q 2^o with o = 0, 2, 4. That the field may lie at
// three places of the mantissa saves two shifts out of three.
DEVICE int offset2(int p) { return p % 3 * 2; }
DEVICE u32 biased2(u32 word, int p) { return and_or(word >> p / 3 * 6, 0x00030003u << offset2(p), BIAS_128); }
// The third bit of 3, which is at bit `at` of the halves of `high`, to its place above the other two.
DEVICE u32 with_third_bit(u32 biased, u32 high, int at, int p) {
  const int up = offset2(p) + 2 - at;
  return and_or(up > 0 ? high << up : high >> -up, 0x00040004u << offset2(p), biased);
}
// 128 + q 2^o -> q - z, given -(128 + z): exact, as is 2^(7 - o) + z.
DEVICE u32 unbiased2(u32 biased, u32 minus_zero, int p) {
  constexpr u32 FRACTION[3] = {ONES, 0x3e803e80u, 0x3d803d80u};  // 1, 1/4, 1/16
  constexpr u32 MORE[3] = {0u, 0x42c042c0u, 0x42f042f0u};        // 128 - 2^(7 - o): 0, 96, 120
  return fma_bf16x2(biased, FRACTION[p % 3], p % 3 ? fma_bf16x2(minus_zero, ONES, MORE[p % 3]) : minus_zero);
}

// Of 8 bits, bytes `low` and `low + 1` of a word: q - z, given 2^23 + z of both. An fp32 0x4b000000 | q is 2^23 + q, and a
// difference of at most eight bits is all in the upper half of an fp32.
constexpr float ABOVE_BYTE = 8388608.f;  // 2^23
DEVICE u32 difference8(u32 word, int low, float even_zero, float odd_zero) {
  const float even = bits_to_float(permute_bytes(word, 0x4b000000u, 0x7440 + low)) - even_zero;
  const float odd = bits_to_float(permute_bytes(word, 0x4b000000u, 0x7441 + low)) - odd_zero;
  return permute_bytes(float_to_bits(even), float_to_bits(odd), 0x7632);
}

// HALF: scales are fp16, else bf16. INNER: a group is smaller than a chunk (then each lane's run lies in one group), and the
// scale has to be on the weights before the tensor core adds over groups.
template <int BITS, int HALF, int INNER = 0>
struct IntGroups : DecoderDefaults {
  static constexpr int CHUNK = BITS == 8 ? 32 : BITS == 4 ? 64 : 128;
  Words4 codes;
  Words2 high;        // 3 bits only
  u32 scale_zero[2];  // of rows g and g + 8

  DEVICE void load(const Parts& parts, int tile_row, int chunk, int lane) {
    const u64 at = first_lane(parts, tile_row, chunk, CHUNK) + lane;
    codes = load_once16((const Words4*)parts.part[0] + at);
    if (BITS == 3) high = load_once8((const Words2*)parts.part[1] + at);
    const int column = chunk * CHUNK + (INNER ? lane % 4 * (CHUNK / 4) : 0);
    const u32 group = tile_row * groups_of_row(parts) + group_of(parts, column);
    const u32* scales = (const u32*)parts.part[BITS == 3 ? 2 : 1] + (16 * group + lane / 4);
    scale_zero[0] = load_constant4(scales);
    scale_zero[1] = load_constant4(scales + 8);
  }

  DEVICE void fragment(int step, u32 (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a[i] = difference(step, i);
      if (INNER) a[i] = multiply_bf16x2(a[i], pack_bf16x2(scale(i % 2), scale(i % 2)));
    }
  }

  DEVICE void scales(float& s0, float& s1) const {
    s0 = INNER ? 1.f : scale(0);
    s1 = INNER ? 1.f : scale(1);
  }

 private:
  DEVICE float scale(int row) const { return HALF ? half_to_float((u16)scale_zero[row]) : bf16_to_float(scale_zero[row]); }

  // q - z, two columns of register i.
  DEVICE u32 difference(int step, int i) const {
    const int row = i % 2, p = step % 2 * 4 + i;
    if (BITS == 8) {
      const float above = ABOVE_BYTE + high_bf16_to_float(scale_zero[row]);
      return difference8(codes.word[2 * step + row], i / 2 * 2, above, above);
    }
    const u32 zero = permute_bytes(scale_zero[row], 0, 0x3232);
    if (BITS == 4) return subtract_bf16x2(biased4(codes.word[step], i), zero);
    const u32 low = biased2(codes.word[step / 2], p);
    return unbiased2(BITS == 3 ? with_third_bit(low, high.word[step / 4], step % 4 * 4 + i, p) : low, zero ^ MINUS_ZEROS, p);
  }
};

// bf16 weights in 12 bits each, without loss: see layouts/lossless.py for how they lie. After linear.cuh.
//
// The 4 bits of an exponent go below the fixed bits 0111 of one: the fragment is the weight times 2^(112 - base), and 2^(base - 112)
// is the row's scale, both exact. Of an escape the tiles hold sign, mantissa and difference 0, which is 2^(base - 127).

struct Lossless : DecoderDefaults {
  static constexpr int CHUNK = 64;
  Words4 low[2];   // signs and mantissas of steps 0 and 1, of steps 2 and 3
  Words4 high;     // exponents less the base, a word for each step
  u32 base;        // of row g, in the next byte that of row g + 8

  DEVICE void load(const Parts& parts, int tile_row, int chunk, int lane) {
    const Words4* tile = (const Words4*)parts.part[0] + (3 * first_lane(parts, tile_row, chunk, CHUNK) + lane);
    low[0] = load_once16(tile);
    low[1] = load_once16(tile + 32);
    high = load_once16(tile + 64);
    base = load_constant2((const u16*)parts.part[1] + 8 * tile_row + lane / 4);
  }

  DEVICE void fragment(int step, u32 (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // A byte twice: its highest bit becomes the sign, its other seven are the mantissa.
      const u32 bytes = permute_bytes(low[step / 2].word[step % 2 * 2 + i % 2], 0, i < 2 ? 0x1100 : 0x3322);
      const u32 nibbles = i < 2 ? high.word[step] << (7 - 4 * i) : high.word[step] >> (4 * i - 7);
      a[i] = and_or(nibbles, 0x07800780u, and_or(bytes, 0x807f807fu, 0x38003800u));
    }
  }

  DEVICE void scales(float& s0, float& s1) const {
    s0 = bits_to_float(((base & 255) + 15) << 23);
    s1 = bits_to_float(((base >> 8) + 15) << 23);
  }

  // An escape's product, less that of what the tiles hold in its place. The warps share a row's escapes, each row's in a fixed order.
  template <int NT>
  static DEVICE void begin(const Parts& parts, int tile_row, const u16* x, int last_token, float (&sums)[NT][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = 16 * tile_row + 8 * half + lane / 4;
      const float held = bits_to_float(load_constant1((const u8*)parts.part[1] + 16 * tile_row + lane / 4 * 2 + half) << 23);
      const u32 end = start(parts, row + 1);
      for (u32 i = start(parts, row) + warp; i < end; i += blockDim.x / 32) {
        const Words2 escape = load_once8((const Words2*)parts.part[3] + i);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int odd = 0; odd < 2; odd++) {
            const u64 token = min(8 * n + lane % 4 * 2 + odd, last_token);
            const float activation = bf16_to_float(load2(x + token * parts.columns + escape.word[0]));
            sums[n][2 * half + odd] += activation * bf16_to_float(escape.word[1]) - activation * held;
          }
      }
    }
  }

  // Escapes among what this lane has just written.
  DEVICE void amend(const Parts& parts, int tile_row, int chunk, int lane, u16* w, int K) const {
    const u32 first = chunk * CHUNK + lane % 4 * (CHUNK / 4);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = 16 * tile_row + 8 * half + lane / 4;
      const u32 end = start(parts, row + 1);
      for (u32 i = start(parts, row); i < end; i++) {
        const Words2 escape = load_once8((const Words2*)parts.part[3] + i);
        if (escape.word[0] - first < CHUNK / 4) w[(u64)row * K + escape.word[0]] = (u16)escape.word[1];
      }
    }
  }

 private:
  static DEVICE u32 start(const Parts& parts, int row) { return load_constant4((const u32*)parts.part[2] + row); }
};

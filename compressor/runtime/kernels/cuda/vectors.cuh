// Vectors of 8 output channels out of a codebook: see layouts/vectors.py for how they lie. After linear.cuh.
//
// The codebooks are copied to dynamic shared memory first, 16 (2^BITS + 2^RESIDUAL_BITS) bytes, by every block: a launch wants
// few blocks, each with several rows of tiles. There ldmatrix looks up 32 vectors at a time, one for each lane's address, and
// transposes them into a fragment. The residual is a second term, so the tensor core adds it in fp32.

template <int BITS, int RESIDUAL_BITS>
struct Vectors : DecoderDefaults {
  static constexpr int CHUNK = 128, TERMS = RESIDUAL_BITS ? 2 : 1;
  Words4 words;  // a half for each step

  static DEVICE void prepare(const Parts& parts) {
    copy(parts.part[1], 0, 1 << BITS);
    if (RESIDUAL_BITS) copy(parts.part[2], 1 << BITS, 1 << RESIDUAL_BITS);
    __syncthreads();
  }

  DEVICE void load(const Parts& parts, int tile_row, int chunk, int lane) {
    words = load_once16((const Words4*)parts.part[0] + (first_lane(parts, tile_row, chunk, CHUNK) + lane));
  }

  DEVICE void fragment(int term, u32 (&a)[4]) const {
    const int step = term / TERMS;
    const u32 word = words.word[step / 2] >> step % 2 * 16 & 0xffffu;
    const u32 entry = term % TERMS ? (1u << BITS) + (word >> BITS) : word & ((1u << BITS) - 1);
    load_matrices_transposed(a, shared_address(dynamic_shared()) + 16 * entry);
  }

 private:
  // Entries of a codebook to where they are looked up.
  static DEVICE void copy(const void* codebook, int first, int entries) {
    Words4* shared = (Words4*)dynamic_shared() + first;
    for (int i = threadIdx.x; i < entries; i += blockDim.x) shared[i] = load_constant16((const Words4*)codebook + i);
  }
};

// Multiplication by a packed weight, and its dequantisation: the frame into which every format puts its decoder. After
// primitives.cuh, before the decoders.
//
// The weights are operand A of mma.m16n8k16 and the tokens operand B, so that one token costs as little as eight. Tiles lie
// as layouts/tile_order.py says: a lane's 16-byte load gives it what it feeds to the tensor core. The warps of a block take the
// chunks of a row of tiles in turn, keep PF tiles on their way from memory, and meet once, at the end, to add up their sums.
//
// A decoder is what one lane holds of one tile:
//
//     struct Name : DecoderDefaults {
//       static constexpr int CHUNK;                                    columns of a tile
//       void load(const Parts&, int tile_row, int chunk, int lane);    starts loads, and waits for none
//       void fragment(int step, u32 (&a)[4]) const;                    operand A of step 0 … CHUNK / 16 - 1
//       void scales(float& s0, float& s1) const;                       of rows g and g + 8, on the sums of this chunk
//       u32 activation(int pair, u32 x) const;                         columns 2 pair, 2 pair + 1 of the lane's run
//       static void prepare(const Parts&);                             before any fragment; ends with a barrier, if it needs one
//
//     and, of what the tiles do not hold, the sums, and the same in a dequantised run:
//
//       static void begin(const Parts&, int tile_row, const u16* x, int last_token, float (&sums)[NT][4]);
//       void amend(const Parts&, int tile_row, int chunk, int lane, u16* w, int K) const;
//     };
//
// A weight that is a sum of TERMS numbers (planes of signs, a residual) has so many fragments to a step, which the tensor core
// adds up: `fragment` gives term t of a step where it is asked for step TERMS * step + t.
//
// Choosing the template's numbers. NT = ceil(M / 8) as far as 8; beyond, the second block of tokens finds the weights in L2.
// RB = 1 until there are many more rows of tiles than blocks fit on the device; 2 then halves the loads of activations.
// WARPS = 8, and PF no more than chunks / WARPS. WARPS * RB * NT is at most 76: the sums meet in 640 bytes each of 48 KB. An SM
// holds four blocks of eight warps at 64 registers a thread, three at 80, two at 128. As (NT, RB, PF), ptxas 13.0 for sm_90a
// takes
//
//                          1, 1, 4   1, 2, 2   2, 1, 4   4, 1, 2   4, 2, 1   8, 1, 2
//     int 4 bits                64        70        79       106       128       142
//     int 2, 3, 8 bits       58-72     63-94     75-80    86-100    97-165   100-180
//     floats, 4 bits         59-64     62-70     64-80    97-104   128-130   138-140
//     floats, 8 bits         48-64     54-62     64-74     78-88         -    98-128
//     input groups, 4 bits     118       123       127       126       158       164   (1, 1, 2: 75)
//
// and spills nothing. Input groups of 2 and 3 bits want PF = 1 (77 for NT = RB = 1): scales and zero points are in the ring.

struct Arguments {
  const void* part[4];  // the tensors of the layout, in its order
  int rows, columns;    // columns padded to whole chunks
  int group;            // columns (of input_groups: rows) that share a scale; 0: all
  int extra;            // the layout's own
};

// The same, with the two divisions by the group that would else be done for every tile.
struct Parts : Arguments {
  u32 groups;            // of columns in a row
  u32 group_reciprocal;  // 2^32 / group, rounded up; 0 for group 0

  explicit DEVICE Parts(const Arguments& arguments) : Arguments(arguments) {
    groups = group ? columns / group : 1;
    group_reciprocal = group ? 0xffffffffu / (u32)group + 1 : 0;
  }
};

struct DecoderDefaults {
  static constexpr int TERMS = 1;
  static DEVICE void prepare(const Parts&) {}
  template <int NT>
  static DEVICE void begin(const Parts&, int, const u16*, int, float (&)[NT][4]) {}
  DEVICE void amend(const Parts&, int, int, int, u16*, int) const {}
  DEVICE void scales(float& s0, float& s1) const { s0 = s1 = 1.f; }
  DEVICE u32 activation(int, u32 x) const { return x; }
};

// Where the 32 lanes of a tile begin, counted in lanes.
DEVICE u64 first_lane(const Parts& parts, int tile_row, int chunk, int columns_of_chunk) {
  return (u64)((u32)tile_row * (u32)(parts.columns / columns_of_chunk) + (u32)chunk) * 32;
}

DEVICE u32 groups_of_row(const Parts& parts) { return parts.groups; }
// The group of a column, for column * group below 2^32 (2^35 if both are multiples of eight).
DEVICE u32 group_of(const Parts& parts, int column) { return multiply_high((u32)column, parts.group_reciprocal); }

// sums += weights of RB tiles x activations of NT x 8 tokens, `offset` columns from where `tokens` point, for one chunk.
template <class Decoder, int NT, int RB>
DEVICE void multiply_chunk(const Decoder (&tiles)[RB], const u16* const (&tokens)[NT], int offset, float (&sums)[RB][NT][4]) {
  float partial[RB][NT][4] = {};
#pragma unroll
  for (int eight = 0; eight < Decoder::CHUNK / 32; eight++) {  // columns of the lane's run: two steps
    Words4 columns[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) columns[n] = load16(tokens[n] + offset + 8 * eight);
#pragma unroll
    for (int r = 0; r < RB; r++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int term = 0; term < Decoder::TERMS; term++) {
          const int step = 2 * eight + half;
          u32 a[4];
          tiles[r].fragment(Decoder::TERMS * step + term, a);
#pragma unroll
          for (int n = 0; n < NT; n++) {
            const u32 b0 = tiles[r].activation(2 * step, columns[n].word[2 * half]);
            const u32 b1 = tiles[r].activation(2 * step + 1, columns[n].word[2 * half + 1]);
            multiply_accumulate(partial[r][n], a, b0, b1);
          }
        }
  }
#pragma unroll
  for (int r = 0; r < RB; r++) {
    float s0, s1;
    tiles[r].scales(s0, s1);
#pragma unroll
    for (int n = 0; n < NT; n++) {
      sums[r][n][0] += s0 * partial[r][n][0];
      sums[r][n][1] += s0 * partial[r][n][1];
      sums[r][n][2] += s1 * partial[r][n][2];
      sums[r][n][3] += s1 * partial[r][n][3];
    }
  }
}

// y [M, N] = x [M, columns] W^T + bias, in bf16. Blocks of 32 WARPS threads; grid (ceil(tile rows / RB), ceil(M / (8 NT))).
template <class Decoder, int NT, int RB, int WARPS, int PF>
__global__ void __launch_bounds__(32 * WARPS)
linear(Arguments arguments, const u16* __restrict__ x, const u16* __restrict__ bias, u16* __restrict__ y, int M, int N) {
  const Parts parts(arguments);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int chunks = parts.columns / Decoder::CHUNK, last_tile_row = (N - 1) / 16;
  const int first_token = 8 * NT * blockIdx.y, first_tile_row = RB * blockIdx.x;
  Decoder ring[PF][RB];
  const auto load = [&](Decoder (&tiles)[RB], int chunk) {  // rows beyond the last are computed twice, and not stored
#pragma unroll
    for (int r = 0; r < RB; r++) tiles[r].load(parts, min(first_tile_row + r, last_tile_row), chunk, lane);
  };
#pragma unroll
  for (int slot = 0; slot < PF; slot++)
    if (warp + slot * WARPS < chunks) load(ring[slot], warp + slot * WARPS);
  Decoder::prepare(parts);
  wait_for_previous_kernel();

  x += (u64)first_token * parts.columns;
  const u16* tokens[NT];  // the lane's activations of the chunk `first`; tokens beyond the last are the last, and not stored
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const u64 token = min(8 * n + g, M - 1 - first_token);
    tokens[n] = x + token * parts.columns + (4 * warp + t) * (Decoder::CHUNK / 4);
  }
  float sums[RB][NT][4] = {};
#pragma unroll
  for (int r = 0; r < RB; r++) Decoder::begin(parts, min(first_tile_row + r, last_tile_row), x, M - 1 - first_token, sums[r]);
  for (int first = warp; first < chunks; first += WARPS * PF) {
#pragma unroll
    for (int slot = 0; slot < PF; slot++) {
      const int chunk = first + slot * WARPS;
      if (chunk >= chunks) break;
      multiply_chunk<Decoder, NT, RB>(ring[slot], tokens, slot * WARPS * Decoder::CHUNK, sums);
      if (chunk + WARPS * PF < chunks) load(ring[slot], chunk + WARPS * PF);
    }
#pragma unroll
    for (int n = 0; n < NT; n++) tokens[n] += WARPS * PF * Decoder::CHUNK;
  }
  let_next_kernel_start();

  constexpr int PITCH = 20;  // of 16 rows: with 20, no two lanes of a warp write to the same bank
  SHARED(float, of_warp, [WARPS][RB][8 * NT][PITCH]);
#pragma unroll
  for (int r = 0; r < RB; r++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) of_warp[warp][r][8 * n + 2 * t + i % 2][g + i / 2 * 8] = sums[r][n][i];
  __syncthreads();
  for (int i = threadIdx.x; i < 128 * RB * NT; i += 32 * WARPS) {
    const int row = i % 16, r = i / 16 % RB, m = i / (16 * RB), n = 16 * (first_tile_row + r) + row;
    if (first_token + m >= M || n >= N) continue;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += of_warp[w][r][m][row];
    if (bias) sum += bf16_to_float(bias[n]);
    y[(u64)(first_token + m) * N + n] = (u16)pack_bf16x2(sum, 0.f);
  }
}

// Two columns of a row as bf16: the sums of terms, times the scale and (for formats that scale activations) what a one would become.
DEVICE u32 scaled_pair(const float (&sum)[2], u32 one, float scale) {
  return pack_bf16x2(sum[0] * bf16_to_float(one) * scale, sum[1] * high_bf16_to_float(one) * scale);
}

// Columns 4 step … 4 step + 3 of the lane's runs in rows g and g + 8: words 2 half and 2 half + 1 of `columns`.
template <class Decoder>
DEVICE void dequantize_step(const Decoder& tile, int step, int half, Words4 (&columns)[2]) {
  float scale[2], sum[4][2];
  tile.scales(scale[0], scale[1]);
#pragma unroll
  for (int j = 0; j < 4; j++) sum[j][0] = sum[j][1] = -0.f;  // to which any number may be added, -0 too, and is itself
#pragma unroll
  for (int term = 0; term < Decoder::TERMS; term++) {
    u32 a[4];
    tile.fragment(Decoder::TERMS * step + term, a);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      sum[j][0] += bf16_to_float(a[j]);
      sum[j][1] += high_bf16_to_float(a[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const u32 one = tile.activation(2 * step + j / 2, ONES);
    columns[j % 2].word[2 * half + j / 2] = scaled_pair(sum[j], one, scale[j % 2]);
  }
}

// Eight columns of a row, as far as there are so many.
DEVICE void store_columns(u16* row, int column, int K, const Words4& columns) {
  if (K % 8 == 0 && column < K) store16(row + column, columns);
  if (K % 8 == 0) return;
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (column + j < K) row[column + j] = (u16)(columns.word[j / 2] >> 16 * (j % 2));
}

// w [N, K] of the weight, in bf16 and in rows. A warp takes a tile at a time; any grid does, of any number of whole warps.
template <class Decoder>
__global__ void dequantize(Arguments arguments, u16* __restrict__ w, int N, int K) {
  const Parts parts(arguments);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int chunks = parts.columns / Decoder::CHUNK, tiles = (N + 15) / 16 * chunks;
  Decoder::prepare(parts);
  wait_for_previous_kernel();
  for (int i = (blockIdx.x * blockDim.x + threadIdx.x) / 32; i < tiles; i += gridDim.x * blockDim.x / 32) {
    const int tile_row = i / chunks, chunk = i % chunks;
    Decoder tile;
    tile.load(parts, tile_row, chunk, lane);
#pragma unroll
    for (int eight = 0; eight < Decoder::CHUNK / 32; eight++) {
      Words4 columns[2];
#pragma unroll
      for (int half = 0; half < 2; half++) dequantize_step(tile, 2 * eight + half, half, columns);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int row = 16 * tile_row + 8 * j + g;
        if (row < N) store_columns(w + (u64)row * K, chunk * Decoder::CHUNK + t * (Decoder::CHUNK / 4) + 8 * eight, K, columns[j]);
      }
    }
    tile.amend(parts, tile_row, chunk, lane, w, K);
  }
}

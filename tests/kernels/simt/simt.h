// Runs CUDA kernels on the CPU, thread by thread: what the kernels' sources need of the language and of primitives.cuh.
//
// Every CUDA thread is a fiber with a stack of its own. Blocks run one after another. A thread runs until it comes to a
// barrier, to an instruction that a warp executes together, or to its end; which runs next is drawn from a seed. What a GPU
// would not tell stops the launch with a message: a barrier that some threads do not reach, a warp whose lanes are at different
// instructions, a misaligned access, a load from outside the tensors that were declared. Shared memory is full of NaN before
// each block.
//
// Not emulated: the text of PTX instructions, the order of additions inside the tensor core, races between blocks, time.
#pragma once
#define SIMT

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define DEVICE inline
#define SHARED(type, name, dimensions) static type name dimensions; simt::enter_shared(name, sizeof name)

namespace simt {

struct Dim3 { unsigned x, y, z; };

// What a lane brings to an instruction of the whole warp, and takes away.
struct Exchange { uint32_t a[4], b[2]; float c[4]; uint32_t address; };

struct Thread { Dim3 index; int lane; Exchange exchange; };

extern Thread* current;
extern Dim3 block_index, block_dim, grid_dim;

// Runs `kernel` for every thread of the grid; returns what went wrong, or null.
const char* launch(Dim3 grid, Dim3 block, size_t dynamic_shared_bytes, unsigned seed, const std::function<void()>& kernel);
void declare(const void* tensor, size_t bytes);  // may be loaded from, until `forget`
void forget();

[[noreturn]] void fail(const char* format, ...);
void barrier();
void together(const char* instruction, void (*execute)(Thread* const lanes[32]));
void enter_shared(void* array, size_t bytes);
extern unsigned char arena[];
extern size_t arena_bytes;

void check(const void* p, size_t bytes, bool load);
void multiply_tile(Thread* const lanes[32]);
void transpose_matrices(Thread* const lanes[32]);
uint16_t to_bf16(double value);  // to nearest even
float from_bf16(uint32_t bits);  // the lower half
float from_half(uint16_t bits);

template <class T> T load(const void* p) { check(p, sizeof(T), true); T value; std::memcpy(&value, p, sizeof value); return value; }

}  // namespace simt

#define threadIdx (simt::current->index)
#define blockIdx simt::block_index
#define blockDim simt::block_dim
#define gridDim simt::grid_dim
inline void __syncthreads() { simt::barrier(); }
inline int min(int a, int b) { return std::min(a, b); }

struct alignas(8) Words2 { uint32_t word[2]; };
struct alignas(16) Words4 { uint32_t word[4]; };

inline Words4 load_once16(const void* p) { return simt::load<Words4>(p); }
inline Words2 load_once8(const void* p) { return simt::load<Words2>(p); }
inline Words4 load_constant16(const void* p) { return simt::load<Words4>(p); }
inline uint32_t load_constant4(const void* p) { return simt::load<uint32_t>(p); }
inline uint32_t load_constant2(const void* p) { return simt::load<uint16_t>(p); }
inline uint32_t load_constant1(const void* p) { return simt::load<uint8_t>(p); }
inline Words4 load16(const void* p) { return simt::load<Words4>(p); }
inline uint32_t load2(const void* p) { return simt::load<uint16_t>(p); }
inline void store16(void* p, Words4 v) { simt::check(p, sizeof v, false); std::memcpy(p, &v, sizeof v); }

inline float bits_to_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }
inline float half_to_float(uint16_t h) { return simt::from_half(h); }
inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline uint32_t pack_bf16x2(float low, float high) { return simt::to_bf16(low) | (uint32_t)simt::to_bf16(high) << 16; }
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const double product = (double)simt::from_bf16(a >> shift) * simt::from_bf16(b >> shift);
    result |= (uint32_t)simt::to_bf16(product + simt::from_bf16(c >> shift)) << shift;
  }
  return result;
}

inline void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::Exchange& mine = simt::current->exchange;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.c, c, sizeof c);
  mine.b[0] = b0;
  mine.b[1] = b1;
  simt::together("mma.m16n8k16", simt::multiply_tile);
  std::memcpy(c, mine.c, sizeof c);
}

inline unsigned char* dynamic_shared() { return simt::arena; }
inline uint32_t shared_address(const void* p) {
  const size_t offset = (const unsigned char*)p - simt::arena;
  if (offset >= simt::arena_bytes) simt::fail("shared_address: not in the dynamic shared memory of %zu bytes", simt::arena_bytes);
  return (uint32_t)offset;
}
inline void load_matrices_transposed(uint32_t (&a)[4], uint32_t address) {
  simt::current->exchange.address = address;
  simt::together("ldmatrix.x4.trans", simt::transpose_matrices);
  std::memcpy(a, simt::current->exchange.a, sizeof a);
}

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

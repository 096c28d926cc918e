#include "simt.h"

#include <ucontext.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <random>
#include <utility>
#include <vector>

namespace simt {

namespace {

constexpr size_t STACK = 64 << 10, ARENA = 227 << 10;
enum State { READY, AT_BARRIER, TOGETHER, DONE };

struct Fiber : Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state;
  const char* instruction;  // that it waits to execute with its warp
  void (*execute)(Thread* const lanes[32]);
};

std::vector<std::unique_ptr<Fiber>> pool;
ucontext_t scheduler;
const std::function<void()>* kernel;
char message[256];
bool failed;
std::vector<std::pair<const unsigned char*, size_t>> tensors;
std::vector<void*> shared;  // arrays that this block has entered

Fiber& running() { return *static_cast<Fiber*>(current); }

void pause(State state) {
  Fiber& fiber = running();
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

void body() {
  (*kernel)();
  pause(DONE);
}

void start(Fiber& fiber, Dim3 index, int lane) {
  fiber.index = index;
  fiber.lane = lane;
  fiber.state = READY;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = STACK;
  makecontext(&fiber.context, body, 0);
}

// Runs the lanes of a warp, in an order drawn anew each time, until all of them are at a barrier or done.
void run_warp(int warp, std::mt19937& random) {
  int order[32];
  Thread* lanes[32];
  for (int lane = 0; lane < 32; lane++) lanes[order[lane] = lane] = pool[32 * warp + lane].get();
  for (;;) {
    std::shuffle(order, order + 32, random);
    int waiting = 0;
    for (int lane : order) {
      Fiber& fiber = *pool[32 * warp + lane];
      if (fiber.state == READY) {
        current = &fiber;
        swapcontext(&scheduler, &fiber.context);
        if (failed) return;
      }
      waiting += fiber.state == TOGETHER;
    }
    if (!waiting) return;
    const Fiber& first = *pool[32 * warp + order[0]];
    for (int lane = 0; lane < 32; lane++) {
      Fiber& fiber = *pool[32 * warp + lane];
      if (waiting < 32 || fiber.instruction != first.instruction) {
        std::snprintf(message, sizeof message, "warp %d: %d of 32 lanes at an instruction that all execute together, or not the same one",
                      warp, waiting);
        failed = true;
        return;
      }
      fiber.state = READY;
    }
    first.execute(lanes);
    if (failed) return;
  }
}

void run_block(int warps, std::mt19937& random) {
  std::vector<int> order(warps);
  for (int warp = 0; warp < warps; warp++) order[warp] = warp;
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    for (int warp : order) {
      run_warp(warp, random);
      if (failed) return;
    }
    int done = 0;
    for (int i = 0; i < 32 * warps; i++) {
      done += pool[i]->state == DONE;
      if (pool[i]->state == AT_BARRIER) pool[i]->state = READY;
    }
    if (done == 32 * warps) return;
    if (done) {
      std::snprintf(message, sizeof message, "%d of %d threads ended and the others wait at a barrier", done, 32 * warps);
      failed = true;
      return;
    }
  }
}

}  // namespace

Thread* current;
Dim3 block_index, block_dim, grid_dim;
alignas(128) unsigned char arena[ARENA];
size_t arena_bytes;

const char* launch(Dim3 grid, Dim3 block, size_t dynamic_shared_bytes, unsigned seed, const std::function<void()>& function) {
  kernel = &function;
  grid_dim = grid;
  block_dim = block;
  arena_bytes = dynamic_shared_bytes;
  failed = false;
  std::mt19937 random(seed);
  if (block.x % 32 || block.y != 1 || block.z != 1) return "launch: blocks are whole warps in one dimension";
  if (arena_bytes > ARENA) return "launch: more than 227 KB of shared memory";
  while (pool.size() < block.x) pool.push_back(std::make_unique<Fiber>());
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        block_index = {x, y, z};
        shared.clear();
        enter_shared(arena, arena_bytes);
        for (unsigned i = 0; i < block.x; i++) start(*pool[i], {i, 0, 0}, i % 32);
        run_block(block.x / 32, random);
        if (failed) return message;
      }
  return nullptr;
}

void declare(const void* tensor, size_t bytes) { tensors.push_back({(const unsigned char*)tensor, bytes}); }
void forget() { tensors.clear(); }

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  failed = true;
  pause(DONE);  // for ever
  std::abort();
}

void barrier() { pause(AT_BARRIER); }

void together(const char* instruction, void (*execute)(Thread* const lanes[32])) {
  running().instruction = instruction;
  running().execute = execute;
  pause(TOGETHER);
}

void enter_shared(void* array, size_t bytes) {
  if (std::find(shared.begin(), shared.end(), array) != shared.end()) return;
  std::memset(array, 0xff, bytes);
  shared.push_back(array);
}

void check(const void* p, size_t bytes, bool load) {
  if ((uintptr_t)p % bytes) fail("misaligned access of %zu bytes", bytes);
  if (!load) return;
  for (const auto& [begin, size] : tensors)
    if (begin <= p && (const unsigned char*)p + bytes <= begin + size) return;
  fail("load of %zu bytes from outside every tensor", bytes);
}

float from_bf16(uint32_t bits) { return bits_to_float(bits << 16); }

uint16_t to_bf16(double value) {
  if (std::isnan(value)) return 0x7fff;
  float truncated = (float)value;  // to odd: what is lost in fp32 must not turn a bf16 that is just off a tie into a tie
  if (truncated != value && !std::isinf(truncated)) {
    if (std::fabs(truncated) > std::fabs(value)) truncated = std::nextafterf(truncated, 0.f);
    truncated = bits_to_float(float_to_bits(truncated) | 1);
  }
  const uint32_t bits = float_to_bits(truncated);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp((float)fraction, -24)
                                     : std::ldexp(1.f + fraction / 1024.f, exponent - 15);
  return bits & 0x8000 ? -size : size;
}

// mma.m16n8k16 of the PTX manual: with lane = 4 g + t, register i of A holds row g + 8 (i % 2) and columns 2 t, 2 t + 1
// (+ 8 for i >= 2), register i of B rows 2 t, 2 t + 1 (+ 8 for i = 1) of column g, C rows g and g + 8 of columns 2 t, 2 t + 1.
void multiply_tile(Thread* const lanes[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Exchange& its = lanes[lane]->exchange;
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 4; i++) a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = from_bf16(its.a[i] >> 16 * half);
      for (int i = 0; i < 2; i++) b[2 * t + half + i * 8][g] = from_bf16(its.b[i] >> 16 * half);
    }
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
      double sum = lanes[lane]->exchange.c[i];
      for (int k = 0; k < 16; k++) sum += (double)a[row][k] * b[k][column];
      lanes[lane]->exchange.c[i] = (float)sum;
    }
}

// ldmatrix.m8n8.x4.trans: row i of matrix j is at the address of lane 8 j + i; lane 4 g + t gets column g, rows 2 t and 2 t + 1.
void transpose_matrices(Thread* const lanes[32]) {
  for (int lane = 0; lane < 32; lane++) {
    const uint32_t address = lanes[lane]->exchange.address;
    if (address % 16 || address + 16 > arena_bytes) {
      std::snprintf(message, sizeof message, "ldmatrix: address %u of lane %d, of %zu bytes", address, lane, arena_bytes);
      failed = true;
      return;
    }
  }
  for (int lane = 0; lane < 32; lane++)
    for (int j = 0; j < 4; j++) {
      uint16_t pair[2];
      for (int half = 0; half < 2; half++)
        std::memcpy(&pair[half], arena + lanes[8 * j + 2 * (lane % 4) + half]->exchange.address + 2 * (lane / 4), 2);
      lanes[lane]->exchange.a[j] = pair[0] | (uint32_t)pair[1] << 16;
    }
}

}  // namespace simt

extern "C" void simt_declare(const void* tensor, size_t bytes) { simt::declare(tensor, bytes); }
extern "C" void simt_forget() { simt::forget(); }

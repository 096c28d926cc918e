// Types, the hardware's instructions in one-line wrappers, and conversions. Comes first; includes nothing, so that NVRTC needs
// no header path. The tests compile these files with g++ (SIMT is defined then): simt.h stands in for what is between the #ifs.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef SIMT

#define DEVICE __device__ __forceinline__
#define SHARED(type, name, dimensions) __shared__ type name dimensions

struct __align__(8) Words2 { u32 word[2]; };
struct __align__(16) Words4 { u32 word[4]; };

// Weights: read once, so they need no place in L1. Never written while a kernel runs, hence .nc.
DEVICE Words4 load_once16(const void* p) { Words4 v; asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(p)); return v; }
DEVICE Words2 load_once8(const void* p) { Words2 v; asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "l"(p)); return v; }
// Scales and other parts of weights that several warps read: through L1.
DEVICE Words4 load_constant16(const void* p) { Words4 v; asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(p)); return v; }
DEVICE u32 load_constant4(const void* p) { u32 v; asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p)); return v; }
DEVICE u32 load_constant2(const void* p) { u16 v; asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p)); return v; }
DEVICE u32 load_constant1(const void* p) { u32 v; asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p)); return v; }
// Activations: the kernel before may still be writing them when this one starts, so not .nc.
DEVICE Words4 load16(const void* p) { Words4 v; asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "l"(p)); return v; }
DEVICE u32 load2(const void* p) { u16 v; asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p)); return v; }
DEVICE void store16(void* p, Words4 v) { asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" :: "l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]) : "memory"); }

// (a & mask) | bits in one instruction: left to itself the compiler takes two.
DEVICE u32 and_or(u32 a, u32 mask, u32 bits) { u32 r; asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(bits)); return r; }
DEVICE u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
// Two bf16 at a time. fma is the only one of its kind that every architecture from sm_80 has.
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
DEVICE float half_to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_to_bits(float f) { return __float_as_uint(f); }
// Rounds to nearest even; `low` is the lower half.
DEVICE u32 pack_bf16x2(float low, float high) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }

// c += a b: a is 16 x 16 (weights), b 16 x 8 (tokens); see layouts/tile_order.py for which lane holds what.
DEVICE void multiply_accumulate(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }

// The launch's dynamic shared memory, and the address that ldmatrix wants.
DEVICE u8* dynamic_shared() { extern __shared__ __align__(128) u8 bytes[]; return bytes; }
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Four 8 x 8 matrices, row i of matrix j at the address that lane 8 j + i gives; each lane gets column `lane / 4` of each, rows 2 (lane % 4) and the next.
DEVICE void load_matrices_transposed(u32 (&a)[4], u32 address) { asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(address) : "memory"); }

// Programmatic dependent launch (sm_90 and later): this kernel may start while the one before it still runs, and waits here
// for its results; the next may start once every block has said so.
#if __CUDA_ARCH__ >= 900
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }
#else
DEVICE void wait_for_previous_kernel() {}
DEVICE void let_next_kernel_start() {}
#endif

#endif  // SIMT

// bf16 constants, twice each.
constexpr u32 ONES = 0x3f803f80u, MINUS_ONES = 0xbf80bf80u, MINUS_ZEROS = 0x80008000u;

DEVICE u32 subtract_bf16x2(u32 a, u32 b) { return fma_bf16x2(b, MINUS_ONES, a); }
DEVICE u32 multiply_bf16x2(u32 a, u32 b) { return fma_bf16x2(a, b, MINUS_ZEROS); }  // adding -0 keeps the sign of a zero
DEVICE float bf16_to_float(u32 bits) { return bits_to_float(bits << 16); }  // the lower half
DEVICE float high_bf16_to_float(u32 bits) { return bits_to_float(bits & 0xffff0000u); }
DEVICE u32 both_halves(u32 halfword) { return permute_bytes(halfword, 0, 0x1010); }  // the lower half twice

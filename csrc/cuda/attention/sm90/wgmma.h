// wgmma (sm_90a): a warpgroup of four warps multiplies, asynchronously, D[64 x N] += A[64 x 16] B[16 x N] with float
// accumulators. B, and A unless it comes from registers, lie in shared memory as a descriptor says.
//
// Accumulators and register operands are laid out as those of mma.sync (mma.h), of which warp w holds rows 16 w to
// 16 w + 15: c[n] are columns 8 n to 8 n + 7. They must not be touched from the product to the wait for it, and the
// first product needs start_products() after whatever touched them before. Shared memory that ordinary stores or
// cp.async wrote must have passed fence_async_proxy().
#pragma once
#include "../../element.h"
#include "../swizzle.h"

namespace rfkernels::cuda {

__device__ __forceinline__ void start_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// What was written to shared memory before is seen by wgmma, which reads it by another path.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Nothing may read or write these registers before this point: the compiler does not know that a product takes time.
template <int kCount>
__device__ __forceinline__ void settle(float (&x)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(x[n][i])::"memory");
}

// Waits until at most kPending of the newest committed groups of products run, none of which may use the arrays given.
template <int kPending, class... Accumulators>
__device__ __forceinline__ void wait_products(Accumulators&... finished) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (settle(finished), ...);
}

// Descriptor of a SharedTile, whose permutation is wgmma's swizzle of 128, 64 or 32 bytes, by the width of its slabs.
// The same numbers serve rows that are K-major (queries, keys: eight rows are 8 * kRowBytes apart, and one slab is read
// at a time) and MN-major (values: eight keys are so far apart, the columns' slabs kSlabBytes).
template <class Tile>
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  constexpr uint32_t kSwizzle = Tile::kSlabUnits == 8 ? 1 : Tile::kSlabUnits == 4 ? 2 : 3;
  static_assert(Tile::kSlabBytes % 1024 == 0 && Tile::kSlabBytes < 1 << 18);
  const uint32_t low = address >> 4 | (Tile::kSlabBytes >> 4) << 16;
  const uint32_t high = 8 * Tile::kRowBytes >> 4 | kSwizzle << 30;
  return uint64_t(high) << 32 | low;
}

// What to add to a descriptor for the columns 16 * block onwards, and for the row `row` onwards, a multiple of 8.
template <class Tile>
__device__ __forceinline__ constexpr int columns_onwards(int block) {
  return (block / (Tile::kSlabUnits / 2) * Tile::kSlabBytes + block % (Tile::kSlabUnits / 2) * 32) >> 4;
}
template <class Tile>
__device__ __forceinline__ constexpr int rows_onwards(int row) {
  return row * Tile::kRowBytes >> 4;
}

// The products by N, instructions of one shape: RF_C<n> names n accumulators in the text, RF_A<n> passes them.
#define RF_C8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RF_C16 RF_C8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define RF_C24 RF_C16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define RF_C32 RF_C24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define RF_C40 RF_C32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define RF_C48 RF_C40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define RF_C56 RF_C48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define RF_C64 RF_C56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define RF_C72 RF_C64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define RF_C80 RF_C72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define RF_C88 RF_C80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define RF_C96 RF_C88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define RF_C104 RF_C96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define RF_C112 RF_C104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define RF_C120 RF_C112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define RF_C128 RF_C120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define RF_A4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define RF_A8(c, n) RF_A4(c, n), RF_A4(c, n + 1)
#define RF_A16(c, n) RF_A8(c, n), RF_A8(c, n + 2)
#define RF_A32(c, n) RF_A16(c, n), RF_A16(c, n + 4)
#define RF_A64(c, n) RF_A32(c, n), RF_A32(c, n + 8)
#define RF_A40(c, n) RF_A32(c, n), RF_A8(c, n + 8)
#define RF_A48(c, n) RF_A32(c, n), RF_A16(c, n + 8)
#define RF_A128(c, n) RF_A64(c, n), RF_A64(c, n + 16)

// accumulate: 0 replaces the accumulators. 1, 1: the signs of A and B. major: which operands in shared memory are
// MN-major.
#define RF_TEXT(N, type, count, a, b, accumulate, major)                                              \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate                                                    \
  ", 0;\n"                                                                                            \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #type "." #type " {" RF_C##count "}, " a ", %" #b \
                                                                                     ", p, 1, 1, " major ";\n}"

// shared: A and B from K-major tiles. registers: A from registers, B from an MN-major tile.
template <class T, int kColumns>
struct Wgmma;

// count: N / 2, the accumulators of a thread; i to o: the numbers of the operands after them.
#define RF_WGMMA(T, type, N, count, i, j, k, l, m, o)                                                             \
  template <>                                                                                                     \
  struct Wgmma<T, N> {                                                                                            \
    static __device__ __forceinline__ void shared(float (&c)[N / 8][4], uint64_t a, uint64_t b, int accumulate) { \
      asm volatile(RF_TEXT(N, type, count, "%" #i, j, k, "0, 0")                                                  \
                   : RF_A##count(c, 0)                                                                            \
                   : "l"(a), "l"(b), "r"(accumulate));                                                            \
    }                                                                                                             \
    static __device__ __forceinline__ void registers(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {  \
      asm volatile(RF_TEXT(N, type, count, "{%" #i ", %" #j ", %" #k ", %" #l "}", m, o, "1")                     \
                   : RF_A##count(c, 0)                                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                                 \
    }                                                                                                             \
  };
RF_WGMMA(Half, f16, 64, 32, 32, 33, 34, 35, 36, 37)
RF_WGMMA(BFloat16, bf16, 64, 32, 32, 33, 34, 35, 36, 37)
RF_WGMMA(Half, f16, 80, 40, 40, 41, 42, 43, 44, 45)
RF_WGMMA(BFloat16, bf16, 80, 40, 40, 41, 42, 43, 44, 45)
RF_WGMMA(Half, f16, 96, 48, 48, 49, 50, 51, 52, 53)
RF_WGMMA(BFloat16, bf16, 96, 48, 48, 49, 50, 51, 52, 53)
RF_WGMMA(Half, f16, 128, 64, 64, 65, 66, 67, 68, 69)
RF_WGMMA(BFloat16, bf16, 128, 64, 64, 65, 66, 67, 68, 69)
RF_WGMMA(Half, f16, 256, 128, 128, 129, 130, 131, 132, 133)
RF_WGMMA(BFloat16, bf16, 256, 128, 128, 129, 130, 131, 132, 133)

}  // namespace rfkernels::cuda

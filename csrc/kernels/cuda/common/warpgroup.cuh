// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Matrix products of a warpgroup (four warps), operands in shared memory: sums += left right^T, both as the
// copy engine lays them with 128-byte swizzling, rows of 64 16-bit elements, 8 rows to 1024 bytes. An operand
// may also lie across: its columns, over which the product adds up, are the tile's rows. Compute capability
// 9.0 alone ("sm_90a").

namespace mixture_of_mamba::warpgroup {

constexpr int kRows = 64;       // of the left operand
constexpr int kColumns = 16;    // of both, in one instruction
constexpr int kRowBytes = 128;  // of a tile's row, the span of the swizzle

// A tile for the instruction: its address, the distance between groups of 8 rows, the swizzle; of one that
// lies across, also the distance between its spans of 64.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t span_distance = 16) {
  constexpr uint64_t kUnit = 16;
  return (address & 0x3FFFF) / kUnit | span_distance / kUnit << 16 | 8 * kRowBytes / kUnit << 32 |
         uint64_t{1} << 62;
}

__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending of the committed groups are not done.
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Of the threads of a warpgroup alone; each has a number from 1 to 15.
__device__ __forceinline__ void barrier(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory");
}

// Registers of every thread of a warpgroup, that others have given up; a multiple of 8.
template <int kCount>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// sums += left [64, 16] right [kN, 16]^T, or = where not `add`. Lane l of warp w has the sums of left row 16
// w + l / 4 + 8 b and right row 8 j + l % 4 * 2 + a in sums[4 j + 2 b + a]. They may be touched after begin()
// and wait<0>() only.
template <typename T, int kN, bool kLeftAcross, bool kRightAcross>
struct Multiply;
template <typename T, int kN, bool kLeftAcross = false, bool kRightAcross = false>
__device__ __forceinline__ void multiply(float (&sums)[kN / 2], uint64_t left, uint64_t right,
                                         bool add = true) {
  Multiply<T, kN, kLeftAcross, kRightAcross>::run(sums, left, right, add);
}

#define MOM_LIST_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOM_LIST_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define MOM_LIST_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define MOM_LIST_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define MOM_LIST_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define MOM_LIST_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define MOM_LIST_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define MOM_LIST_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define MOM_LIST_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define MOM_LIST_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define MOM_LIST_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define MOM_LIST_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define MOM_LIST_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define MOM_LIST_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define MOM_LIST_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define MOM_LIST_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define MOM_LIST_16 MOM_LIST_0
#define MOM_LIST_32 MOM_LIST_16 ", " MOM_LIST_1
#define MOM_LIST_64 MOM_LIST_32 ", " MOM_LIST_2 ", " MOM_LIST_3
#define MOM_LIST_96 MOM_LIST_64 ", " MOM_LIST_4 ", " MOM_LIST_5
#define MOM_LIST_128 MOM_LIST_96 ", " MOM_LIST_6 ", " MOM_LIST_7
#define MOM_LIST_192 MOM_LIST_128 ", " MOM_LIST_8 ", " MOM_LIST_9 ", " MOM_LIST_10 ", " MOM_LIST_11
#define MOM_LIST_256 MOM_LIST_192 ", " MOM_LIST_12 ", " MOM_LIST_13 ", " MOM_LIST_14 ", " MOM_LIST_15
#define MOM_SUMS_8(i)                                                                        \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define MOM_SUMS_16 MOM_SUMS_8(0)
#define MOM_SUMS_32 MOM_SUMS_16, MOM_SUMS_8(8)
#define MOM_SUMS_64 MOM_SUMS_32, MOM_SUMS_8(16), MOM_SUMS_8(24)
#define MOM_SUMS_96 MOM_SUMS_64, MOM_SUMS_8(32), MOM_SUMS_8(40)
#define MOM_SUMS_128 MOM_SUMS_96, MOM_SUMS_8(48), MOM_SUMS_8(56)
#define MOM_SUMS_192 MOM_SUMS_128, MOM_SUMS_8(64), MOM_SUMS_8(72), MOM_SUMS_8(80), MOM_SUMS_8(88)
#define MOM_SUMS_256 MOM_SUMS_192, MOM_SUMS_8(96), MOM_SUMS_8(104), MOM_SUMS_8(112), MOM_SUMS_8(120)
// n: right rows; left, right, ...: the numbers of these operands, behind the n / 2 sums.
#define MOM_MULTIPLY(type, cuda_type, n, left_at, right_at, add_at, left_across_at, right_across_at)       \
  template <bool kLeftAcross, bool kRightAcross>                                                           \
  struct Multiply<cuda_type, n, kLeftAcross, kRightAcross> {                                               \
    static __device__ __forceinline__ void run(float (&sums)[n / 2], uint64_t left, uint64_t right,        \
                                               int add) {                                                  \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add_at                                        \
                   ", 0;\n"                                                                                \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" MOM_LIST_##n       \
                   "}, %" #left_at ", %" #right_at ", add, 1, 1, %" #left_across_at ", %" #right_across_at \
                   ";\n}"                                                                                  \
                   : MOM_SUMS_##n                                                                          \
                   : "l"(left), "l"(right), "r"(add), "n"(int{kLeftAcross}), "n"(int{kRightAcross}));      \
    }                                                                                                      \
  };
#define MOM_MULTIPLY_TYPES(...) \
  MOM_MULTIPLY("bf16", __nv_bfloat16, __VA_ARGS__) MOM_MULTIPLY("f16", __half, __VA_ARGS__)
MOM_MULTIPLY_TYPES(16, 8, 9, 10, 11, 12)
MOM_MULTIPLY_TYPES(32, 16, 17, 18, 19, 20)
MOM_MULTIPLY_TYPES(64, 32, 33, 34, 35, 36)
MOM_MULTIPLY_TYPES(96, 48, 49, 50, 51, 52)
MOM_MULTIPLY_TYPES(128, 64, 65, 66, 67, 68)
MOM_MULTIPLY_TYPES(256, 128, 129, 130, 131, 132)
#undef MOM_MULTIPLY_TYPES
#undef MOM_MULTIPLY
#undef MOM_SUMS_256
#undef MOM_SUMS_192
#undef MOM_SUMS_128
#undef MOM_SUMS_96
#undef MOM_SUMS_64
#undef MOM_SUMS_32
#undef MOM_SUMS_16
#undef MOM_SUMS_8
#undef MOM_LIST_256
#undef MOM_LIST_192
#undef MOM_LIST_128
#undef MOM_LIST_96
#undef MOM_LIST_64
#undef MOM_LIST_32
#undef MOM_LIST_16
#undef MOM_LIST_15
#undef MOM_LIST_14
#undef MOM_LIST_13
#undef MOM_LIST_12
#undef MOM_LIST_11
#undef MOM_LIST_10
#undef MOM_LIST_9
#undef MOM_LIST_8
#undef MOM_LIST_7
#undef MOM_LIST_6
#undef MOM_LIST_5
#undef MOM_LIST_4
#undef MOM_LIST_3
#undef MOM_LIST_2
#undef MOM_LIST_1
#undef MOM_LIST_0

}  // namespace mixture_of_mamba::warpgroup

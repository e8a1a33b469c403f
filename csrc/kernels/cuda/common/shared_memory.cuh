// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Shared memory by 32-bit address, for code that computes its addresses once and not at each use.

namespace mixture_of_mamba {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The compiler no longer knows how the value came about, so it keeps it instead of computing it again.
__device__ __forceinline__ void opaque(uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void opaque(int32_t& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void opaque(float& value) { asm volatile("" : "+f"(value)); }
template <typename T>
__device__ __forceinline__ void opaque(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

__device__ __forceinline__ void store_shared(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t at, const float4& v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

// kCount floats, 2 or a multiple of 4, at an address aligned to as many bytes (at most 16).
template <int kCount>
__device__ __forceinline__ void store_shared(uint32_t at, const float (&from)[kCount]) {
  if constexpr (kCount == 2) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(from[0]), "f"(from[1]) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      store_shared(at + i * 4, make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]));
    }
  }
}

template <int kCount>
__device__ __forceinline__ void load_shared(uint32_t at, float (&to)[kCount]) {
  if constexpr (kCount == 2) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "r"(at) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(to[i]), "=f"(to[i + 1]), "=f"(to[i + 2]), "=f"(to[i + 3])
                   : "r"(at + i * 4)
                   : "memory");
    }
  }
}

__device__ __forceinline__ uint4 load_word(uint32_t at) {
  uint4 word;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(at)
               : "memory");
  return word;
}

// Four matrices of 8 x 8 16-bit elements, of which lane l holds the elements 2 (l % 4) and the next of row l
// / 4. Lane l gives the address of row l % 8 of matrix l / 8. Compute capability 9.0 and up.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// Back again.
__device__ __forceinline__ void load_matrices(uint32_t row, uint32_t& a, uint32_t& b, uint32_t& c,
                                              uint32_t& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(row)
               : "memory");
}

}  // namespace mixture_of_mamba

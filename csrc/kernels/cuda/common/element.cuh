// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Element types of activations on the device: float, __nv_bfloat16, __half.

namespace mixture_of_mamba {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// kCount consecutive elements as floats, moved in the widest accesses their size allows: the address
// must be aligned to min(16, kCount * sizeof(T)) bytes when `kAligned`, to one element otherwise.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  T values[kCount];
};

template <int kBytes>
struct Words;
template <>
struct Words<16> {
  using type = uint4;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<4> {
  using type = uint32_t;
};
template <>
struct Words<2> {
  using type = uint16_t;
};

template <typename T, int kCount, bool kAligned>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* from) {
  Pack<T, kCount> pack;
  if constexpr (kAligned) {
    constexpr int kBytes = kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16;
    using Word = typename Words<kBytes>::type;
    constexpr int kWords = kCount * sizeof(T) / kBytes;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<Word*>(pack.values)[i] = reinterpret_cast<const Word*>(from)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.values[i] = from[i];
  }
  return pack;
}

template <typename T, int kCount, bool kAligned>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kCount>& pack) {
  if constexpr (kAligned) {
    constexpr int kBytes = kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16;
    using Word = typename Words<kBytes>::type;
    constexpr int kWords = kCount * sizeof(T) / kBytes;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(pack.values)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = pack.values[i];
  }
}

}  // namespace mixture_of_mamba

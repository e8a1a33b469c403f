// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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

// Two 16-bit elements in a word; the first in its low half.
template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  } else {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// All elements as floats. Words are taken apart, not elements: one instruction each.
template <typename T, int kCount>
__device__ __forceinline__ void to_floats(const Pack<T, kCount>& pack, float (&to)[kCount]) {
  if constexpr (sizeof(T) == 4 || kCount % 2 == 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = to_float(pack.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float2 pair = unpack_pair<T>(reinterpret_cast<const uint32_t*>(pack.values)[i / 2]);
      to[i] = pair.x, to[i + 1] = pair.y;
    }
  }
}

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> from_floats(const float (&from)[kCount]) {
  Pack<T, kCount> pack;
  if constexpr (sizeof(T) == 4 || kCount % 2 == 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.values[i] = from_float<T>(from[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      reinterpret_cast<uint32_t*>(pack.values)[i / 2] = pack_pair<T>(from[i], from[i + 1]);
    }
  }
  return pack;
}

// Two elements, or one of 32 bits, as a word: minus infinity.
template <typename T>
__device__ constexpr uint32_t minus_infinities() {
  return sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, __half> ? 0xfc00fc00u : 0xff80ff80u;
}

// Where a bit of `keep` is 0, that bit of every word of `pack` becomes the one of `word`.
template <typename T, int kCount>
__device__ __forceinline__ void keep_bits(uint32_t keep, Pack<T, kCount>& pack, uint32_t word) {
  static_assert(kCount * sizeof(T) % 4 == 0, "whole words");
#pragma unroll
  for (int i = 0; i < kCount * static_cast<int>(sizeof(T)) / 4; ++i) {
    uint32_t& own = reinterpret_cast<uint32_t*>(pack.values)[i];
    own = (own & keep) | (word & ~keep);
  }
}

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

// 16 bytes to global memory in one access, as a plain store of them is not always.
__device__ __forceinline__ void store_word(void* to, const uint4& word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z),
               "r"(word.w)
               : "memory");
}

}  // namespace mixture_of_mamba

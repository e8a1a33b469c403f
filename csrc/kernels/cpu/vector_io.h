// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cpu/scalar_types.h"

// Loads and stores of kLanes elements, from and to any element type.

namespace mixture_of_mamba::MOM_ISA {

template <typename Scalar>
inline Vec<Acc<Scalar>> load(const Scalar* p) {
  using T = Acc<Scalar>;
  Vec<T> v;
  if constexpr (std::is_same_v<Scalar, T>) {
    std::memcpy(&v, p, sizeof(v));
  } else if constexpr (std::is_same_v<Scalar, BFloat16>) {
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Full __attribute__((vector_size(kVectorBytes)));
    Half half;
    std::memcpy(&half, p, sizeof(half));
    const Full bits = __builtin_convertvector(half, Full) << 16;
    std::memcpy(&v, &bits, sizeof(v));
  } else {
#if defined(__AVX512F__)
    __m256i half;
    std::memcpy(&half, p, sizeof(half));
    v = (Vec<T>)_mm512_maskz_cvtph_ps(0xffff, half);
#elif defined(__F16C__)
    __m128i half;
    std::memcpy(&half, p, sizeof(half));
    v = (Vec<T>)_mm256_cvtph_ps(half);
#else
    for (int i = 0; i < kLanes<T>; ++i) v[i] = to_float(p[i]);
#endif
  }
  return v;
}

template <typename Scalar>
inline void store(Scalar* p, Vec<Acc<Scalar>> v) {
  using T = Acc<Scalar>;
  if constexpr (std::is_same_v<Scalar, T>) {
    std::memcpy(p, &v, sizeof(v));
  } else if constexpr (std::is_same_v<Scalar, BFloat16>) {
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Full __attribute__((vector_size(kVectorBytes)));
    Full bits;
    std::memcpy(&bits, &v, sizeof(v));
    const Full rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Full nan = (bits >> 16) | 0x40u;
    const Full chosen = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
    const Half half = __builtin_convertvector(chosen, Half);
    std::memcpy(p, &half, sizeof(half));
  } else {
#if defined(__AVX512F__)
    const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof(half));
#elif defined(__F16C__)
    const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(p, &half, sizeof(half));
#else
    for (int i = 0; i < kLanes<T>; ++i) p[i] = to_float16(v[i]);
#endif
  }
}

// The first n lanes only; memory beyond is not touched, lanes beyond are 0.
template <typename Scalar>
inline Vec<Acc<Scalar>> load(const Scalar* p, int n) {
  if (n == kLanes<Acc<Scalar>>) return load(p);
  Scalar padded[kLanes<Acc<Scalar>>] = {};
  std::memcpy(padded, p, n * sizeof(Scalar));
  return load(padded);
}
template <typename Scalar>
inline void store(Scalar* p, Vec<Acc<Scalar>> v, int n) {
  if (n == kLanes<Acc<Scalar>>) return store(p, v);
  Scalar padded[kLanes<Acc<Scalar>>];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(Scalar));
}

}  // namespace mixture_of_mamba::MOM_ISA

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <limits>

#include "kernels/cpu/vector_exp.h"

// softplus and sigmoid.

namespace mixture_of_mamba::MOM_ISA {

// log(1 + e) for e in [0, 1], accurate for the smallest e too.
template <typename T>
inline Vec<T> log1p_unit(Vec<T> e) {
  if constexpr (sizeof(T) == 4) {
    constexpr float kMinimax[] = {-0.00324402121f, 0.0198514443f, -0.0569594987f, 0.106036514f,
                                  -0.153055906f,   0.196759388f,  -0.249541342f,  0.333299637f,
                                  -0.499999017f,   1.0f};
    Vec<T> p = splat<T>(kMinimax[0]);
    for (int k = 1; k < 10; ++k) p = p * e + kMinimax[k];
    return p * e;
  } else {
    // 2 atanh(e / (2 + e)); the argument is at most 1/3, so each term is worth a factor 9
    const Vec<T> s = e / (e + T(2));
    const Vec<T> square = s * s;
    constexpr int kTerms = 17;
    Vec<T> sum = splat<T>(T(1) / T(2 * kTerms + 1));
    for (int k = kTerms - 1; k >= 0; --k) sum = sum * square + T(1) / T(2 * k + 1);
    return (s + s) * sum;
  }
}

// 1 / x for x in [1, 2], where division is much dearer than a multiplication: within an ulp.
template <typename T>
inline Vec<T> reciprocal(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> guess = (Vec<T>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return guess + guess * (T(1) - x * guess);
  }
#endif
  return T(1) / x;
}

template <typename T>
inline Vec<T> exp_of_minus_magnitude(Vec<T> x) {
  IntVec<T> bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits |= std::numeric_limits<typename VectorOf<T>::Int>::min();
  std::memcpy(&x, &bits, sizeof(x));
  return exp2<T, true>(x * kLog2E<T>);
}

// softplus(x); with `slope`, also its derivative sigmoid(x), from the same exponential.
template <typename T>
inline Vec<T> softplus(Vec<T> x, Vec<T>* slope = nullptr) {
  const Vec<T> e = exp_of_minus_magnitude<T>(x);
  if (slope != nullptr) *slope = (x < T(0) ? e : splat<T>(1)) * reciprocal<T>(e + T(1));
  return maximum<T>(x, T(0)) + log1p_unit<T>(e);
}

template <typename T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_of_minus_magnitude<T>(x);
  return (x < T(0) ? e : splat<T>(1)) * reciprocal<T>(e + T(1));
}

}  // namespace mixture_of_mamba::MOM_ISA

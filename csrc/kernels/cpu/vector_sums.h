// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include "kernels/cpu/vector_types.h"

namespace mixture_of_mamba::MOM_ISA {

// Folds lanes that differ in bit `half`: the sums of a where that bit is 0, of b where it is 1.
template <int half, typename V, int... lane>
inline V fold_lanes(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int kCount = sizeof...(lane);
  return __builtin_shufflevector(a, b, (lane & half ? kCount + lane : lane)...) +
         __builtin_shufflevector(a, b, (lane & half ? kCount + (lane ^ half) : lane ^ half)...);
}

// One vector from kLanes vectors: lane i is the sum of the lanes of v[i]. log2(kLanes) stages of folds.
template <typename T, int count = kLanes<T>>
inline Vec<T> sum_each(const Vec<T>* v) {
  constexpr int half = count / 2;
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<T>>();
  if constexpr (count == 1) {
    return v[0];
  } else {
    Vec<T> folded[half];
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) folded[i] = fold_lanes<half>(v[i], v[i + half], kAll);
    return sum_each<T, half>(folded);
  }
}

}  // namespace mixture_of_mamba::MOM_ISA

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/scalar_type.h"
#include "kernels/cpu/dispatch.h"

// The vector code of the kernels, applied to arrays of any length: whole vectors, then a partial one. It is
// compiled for each instruction set as the kernels are, so nothing of the standard library may be here.

namespace mixture_of_mamba::testing {

template <typename T>
struct VectorMath {
  using Function = void (*)(const T* x, T* y, int64_t count);
  int lanes;
  Function exp2, exp2_negative, log1p_unit, softplus, slope_of_softplus, sigmoid, reciprocal;
  Function maximum_one, minimum_one;            // of x and 1
  void (*sum_each)(const T* vectors, T* sums);  // [lanes, lanes] to [lanes]
};

struct VectorCode {
  VectorMath<float> float32;
  VectorMath<double> float64;
  // Of the 16-bit types, by vectors and by single numbers.
  void (*load)(ScalarType type, const uint16_t* from, float* to, int64_t count);
  void (*store)(ScalarType type, const float* from, uint16_t* to, int64_t count);
  float (*to_float)(ScalarType type, uint16_t bits);
  uint16_t (*from_float)(ScalarType type, float value);
};

// Of the chosen instruction set.
const VectorCode& vector_code();
template <typename T>
const VectorMath<T>& vector_math();
template <>
const VectorMath<float>& vector_math<float>();
template <>
const VectorMath<double>& vector_math<double>();

}  // namespace mixture_of_mamba::testing

namespace mixture_of_mamba {
#define MOM_DECLARE(isa)                        \
  namespace isa {                               \
  extern const testing::VectorCode kVectorCode; \
  }
MOM_DECLARE(baseline)
MOM_DECLARE(avx2)
MOM_DECLARE(avx512)
#undef MOM_DECLARE
}  // namespace mixture_of_mamba

// SPDX-License-Identifier: Apache-2.0
#include "vector_code.h"

namespace mixture_of_mamba::testing {

const VectorCode& vector_code() {
  switch (chosen_isa()) {
    case Isa::kAvx512:
      return avx512::kVectorCode;
    case Isa::kAvx2:
      return avx2::kVectorCode;
    case Isa::kBaseline:
      break;
  }
  return baseline::kVectorCode;
}

template <>
const VectorMath<float>& vector_math<float>() {
  return vector_code().float32;
}
template <>
const VectorMath<double>& vector_math<double>() {
  return vector_code().float64;
}

}  // namespace mixture_of_mamba::testing

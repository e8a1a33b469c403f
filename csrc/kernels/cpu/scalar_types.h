// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/cpu/vector_types.h"

// Element types of activations, as bits, and their conversions.

namespace mixture_of_mamba::MOM_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest even; a NaN stays a NaN.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

#if defined(__F16C__)
inline float to_float(Float16 x) { return _cvtsh_ss(x.bits); }
inline Float16 to_float16(float value) {
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
}
#else
// 2^112 moves float16's exponent bias (15) to float32's (127), denormals included.
inline float to_float(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u | magnitude : 0u;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (special ? special : bits) | static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline Float16 to_float16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (bits < 0x38800000u) {                                                 // a float16 denormal
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // aligns the last kept bit with float32's last bit, rounding to nearest even
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13))};
}
#endif

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
template <typename Scalar, typename T>
inline Scalar from_float(T x) {
  if constexpr (std::is_same_v<Scalar, BFloat16>) {
    return to_bfloat16(x);
  } else if constexpr (std::is_same_v<Scalar, Float16>) {
    return to_float16(x);
  } else {
    return x;
  }
}

// float, or double for double: what a scalar type is computed in.
template <typename Scalar>
using Acc = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

}  // namespace mixture_of_mamba::MOM_ISA

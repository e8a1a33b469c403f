// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

// Elementary functions on the special-function unit, and the formulas of the scan in log2 units: with
// delta scaled by log2(e) a decay is ex2(delta2 * A), one multiplication and one special function.

namespace mixture_of_mamba {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Unlike fminf() and fmaxf(), these hand a NaN on.
__device__ __forceinline__ float lesser(float a, float b) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}
__device__ __forceinline__ float greater(float a, float b) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
}

// 2^x on the FMA pipe, for a share of the exponentials when the special-function unit is the bound.
// 2^f = 1 + f q(f): the decay RATE has a relative error of about 1e-5, also for decays close to 1.
// Saturates beyond 2^126. A NaN is lost: the caller sees to those.
__device__ __forceinline__ float ex2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = fminf(fmaxf(x, -125.0f), 126.0f);
  const float rounded = __fadd_rn(x, kRound);
  const float f = x - (rounded - kRound);
  const float q = fmaf(fmaf(fmaf(0.00967f, f, 0.0555041f), f, 0.2402265f), f, 0.6931472f);
  return __int_as_float(__float_as_int(fmaf(q, f, 1.0f)) + (__float_as_int(rounded) << 23));
}

// log2(1 + 2^x), that is softplus in log2 units. The 16-bit version uses lg2.approx, whose absolute
// error would show for small results, so those come from a series; float uses log1p.
template <typename T>
__device__ __forceinline__ float softplus2(float x) {
  constexpr float kLinearAbove = 30.0f;
  if constexpr (std::is_same_v<T, float>) {
    const float y = kLog2E * log1pf(exp2f(lesser(x, kLinearAbove)));
    return x > kLinearAbove ? x : y;
  } else {
    const float e = ex2(x);
    const float series = e * fmaf(e, fmaf(e, 0.48089835f, -0.72134752f), kLog2E);
    const float y = e < 0.015625f ? series : lg2(1.0f + e);
    return x > kLinearAbove ? x : y;
  }
}

template <typename T>
__device__ __forceinline__ float sigmoid_fast(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return 1.0f / (1.0f + exp2f(-x * kLog2E));
  } else {
    return fmaf(0.5f, tanh_approx(0.5f * x), 0.5f);
  }
}

template <typename T>
__device__ __forceinline__ float silu_fast(float z) {
  if constexpr (std::is_same_v<T, float>) {
    return z / (1.0f + exp2f(-z * kLog2E));
  } else {
    const float half = 0.5f * z;
    return fmaf(half, tanh_approx(half), half);
  }
}

}  // namespace mixture_of_mamba

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>

#include "kernels/common/host_device.h"

// Formulas of the convolution and of the scan, written once. The CPU vector code and the CUDA fast
// paths evaluate the same formulas with their own exp and log; tests compare them with these.

namespace mixture_of_mamba {

// log(1 + e^x) without overflow; from kSoftplusLinearAbove on it equals x to float precision.
constexpr double kSoftplusLinearAbove = 20.0;

template <typename T>
MOM_HOST_DEVICE T softplus(T x) {
  return x > T(kSoftplusLinearAbove) ? x : std::log1p(std::exp(x));
}

// d softplus(x) / dx
template <typename T>
MOM_HOST_DEVICE T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

template <typename T>
MOM_HOST_DEVICE T silu(T x) {
  return x * sigmoid(x);
}

// d silu(x) / dx
template <typename T>
MOM_HOST_DEVICE T silu_slope(T x) {
  const T s = sigmoid(x);
  return s * (T(1) + x * (T(1) - s));
}

}  // namespace mixture_of_mamba

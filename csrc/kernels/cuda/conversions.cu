// SPDX-License-Identifier: Apache-2.0
//
// A column of blocks per conversion; a thread takes every so many-th element. The vectors are small, so what
// counts is that there is one launch.

#include "kernels/conversions.h"

#include "kernels/cuda/common/chained.cuh"
#include "kernels/cuda/common/element.cuh"
#include "kernels/cuda/common/launch.h"

namespace mixture_of_mamba {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // elements, in the longest one
constexpr int64_t kMostBlocks = 1024;

__device__ __forceinline__ float load(ScalarType type, const void* from, int64_t i) {
  switch (type) {
    case ScalarType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(from)[i]);
    case ScalarType::kFloat16:
      return to_float(static_cast<const __half*>(from)[i]);
    default:
      return static_cast<const float*>(from)[i];
  }
}

__device__ __forceinline__ void store(ScalarType type, void* to, int64_t i, float value) {
  switch (type) {
    case ScalarType::kBFloat16:
      static_cast<__nv_bfloat16*>(to)[i] = from_float<__nv_bfloat16>(value);
      break;
    case ScalarType::kFloat16:
      static_cast<__half*>(to)[i] = from_float<__half>(value);
      break;
    default:
      static_cast<float*>(to)[i] = value;
  }
}

__global__ void __launch_bounds__(kThreads) conversions_kernel(const __grid_constant__ ConversionsParams p) {
  wait_for_previous();
  let_next_begin();  // only now: what the next kernels read in advance is from before this one
  const Conversion& c = p.items[blockIdx.y];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < c.count; i += step) {
    float value = load(c.from_type, c.from, i);
    if (c.rule == Conversion::Rule::kMinusExp) value = -expf(value);
    if (c.rule == Conversion::Rule::kMultiply) value *= load(c.from_type, c.factor, i);
    store(c.to_type, c.to, i, value);
  }
}

}  // namespace

int launch_conversions_cuda(const ConversionsParams& p, CUstream_st* stream) {
  int64_t longest = 0;
  for (int k = 0; k < p.count; ++k) {
    const Conversion& c = p.items[k];
    if (c.from_type == ScalarType::kFloat64 || c.to_type == ScalarType::kFloat64)
      return cudaErrorInvalidValue;
    longest = std::max(longest, c.count);
  }
  if (longest == 0) return cudaSuccess;
  const int64_t blocks = std::min(ceil_div(longest, kThreads * kPerThread), kMostBlocks);
  const dim3 grid(static_cast<unsigned>(blocks), p.count);
  return launch_chained({grid, kThreads, 0, stream}, conversions_kernel, p);
}

}  // namespace mixture_of_mamba

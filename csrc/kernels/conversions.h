// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/parallel.h"
#include "kernels/common/scalar_type.h"

// Small vectors from one type to another, many in one launch: what parameters and their gradients need
// before and after the kernels, which take them in the accumulation type.

struct CUstream_st;

namespace mixture_of_mamba {

// to[i] = rule(from[i]), computed in float, or in double where a double takes part. Source and destination
// may be the same memory, or have nothing in common.
struct Conversion {
  enum class Rule : int32_t {
    kCopy,
    kMinusExp,  // -exp(from[i])
    kMultiply,  // from[i] * factor[i]; the factor has the type of `from`
  };
  Rule rule = Rule::kCopy;
  ScalarType from_type = ScalarType::kFloat32, to_type = ScalarType::kFloat32;
  const void* from = nullptr;
  const void* factor = nullptr;
  void* to = nullptr;
  int64_t count = 0;
};

struct ConversionsParams {
  static constexpr int kMost = 32;
  Conversion items[kMost];
  int count = 0;
};

void run_conversions_cpu(const ConversionsParams&, ParallelFor);
int launch_conversions_cuda(const ConversionsParams&, CUstream_st* stream);

}  // namespace mixture_of_mamba

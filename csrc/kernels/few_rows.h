// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "kernels/common/scalar_type.h"

// A projection of few rows, as in decoding: all modalities in one launch, bound by the bytes of the weights.

struct CUstream_st;

namespace mixture_of_mamba {

enum class Settled : int32_t { kNothing, kWeights, kEverything };

// y[row] = weight[m] x[row] + bias[m] for the rows begin[m] .. begin[m + 1] of modality m, in a 16-bit type
// with sums in float32, added in an order that depends on the sizes of a weight and on how many rows a
// modality has at most (docs/kernels/few_rows.md), not on what they are. Rows from begin[modalities] on
// become 0.
struct FewRowsParams {
  static constexpr int kMostModalities = 16;
  ScalarType type = ScalarType::kBFloat16;
  ConstRows x;  // [rows, in_features], at addresses of whole 16-byte words, as are the rows of the weights
  Rows y;       // [rows, out_features]
  int32_t rows = 0, in_features = 0, out_features = 0, modalities = 1;
  const int32_t* offsets = nullptr;  // [modalities + 1] on the device, in place of `begin`; clamped
  int32_t begin[kMostModalities + 1] = {};
  const void* weight[kMostModalities] = {};  // [out_features, in_features]
  int64_t weight_stride[kMostModalities] = {};
  const void* bias[kMostModalities] = {};  // [out_features], or null
  // What was written before the kernels on the stream that may still be running, and may be read at once.
  // After launch_conversions_cuda(), whose kernel lets none begin before all earlier work is done, that is
  // all but what kernels from there on write.
  Settled settled = Settled::kNothing;
};

// Whether the device, types and addresses allow it.
bool few_rows_supports(const FewRowsParams&);
int launch_few_rows_cuda(const FewRowsParams&, CUstream_st* stream);

}  // namespace mixture_of_mamba

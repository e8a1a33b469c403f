// SPDX-License-Identifier: Apache-2.0
//
// Projections of few rows: which are served, and by which of the two kernels.

#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/few_rows_kernels.h"

namespace mixture_of_mamba {

#ifndef MOM_SM90A
bool few_rows::tiles_serve(const FewRowsParams&) { return false; }
int few_rows::launch_tiles(const FewRowsParams&, CUstream_st*) { return cudaErrorNotSupported; }
#endif

bool few_rows_supports(const FewRowsParams& p) {
  constexpr int kWordBytes = 16;
  const auto words = [&](const void* data, int64_t stride) {
    return rows_in_words(data, stride, size_of(p.type), kWordBytes);
  };
  bool ok = (p.type == ScalarType::kBFloat16 || p.type == ScalarType::kFloat16) &&
            p.modalities <= FewRowsParams::kMostModalities && p.in_features > 0 && p.out_features > 0 &&
            p.in_features * size_of(p.type) % kWordBytes == 0 && words(p.x.data, p.x.stride);
  for (int m = 0; ok && m < p.modalities; ++m) ok = words(p.weight[m], p.weight_stride[m]);
  return ok && (few_rows::tiles_serve(p) || few_rows::direct_serves(p));
}

int launch_few_rows_cuda(const FewRowsParams& p, CUstream_st* stream) {
  if (p.rows == 0) return cudaSuccess;
  return few_rows::tiles_serve(p) ? few_rows::launch_tiles(p, stream) : few_rows::launch_direct(p, stream);
}

}  // namespace mixture_of_mamba

// SPDX-License-Identifier: Apache-2.0
//
// Products of groups of rows: what is served. It is there for compute capability 9.0 alone, and only where
// the library is built for it (MOM_SM90A).

#include "kernels/grouped_gemm.h"

#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/common/tensor_map.h"
#include "kernels/cuda/device_info.h"

namespace mixture_of_mamba {

#ifdef MOM_SM90A

bool grouped_gemm_supports(const GroupedGemmParams& p) {
  constexpr int kWordBytes = 16, kMostColumns = 1 << 24, kMostPieces = 1 << 30;
  const int word = kWordBytes / static_cast<int>(size_of(p.type));
  const auto fits = [&](const void* data, int64_t rows, int64_t columns, int64_t stride) {
    return rows_in_words(data, stride, size_of(p.type), kWordBytes) &&
           tensor_map_serves(rows, columns, stride);
  };
  bool ok = (p.type == ScalarType::kBFloat16 || p.type == ScalarType::kFloat16) && p.rows > 0 &&
            p.groups > 0 && p.groups <= GroupedGemmParams::kMostGroups;
  for (const int32_t columns : {p.left_columns, p.right_columns}) {
    ok = ok && columns > 0 && columns <= kMostColumns && columns % word == 0;
  }
  // Numbers of tiles are int32.
  ok = ok && ceil_div(p.rows, 64) * ceil_div(p.right_columns, 64) <= kMostPieces &&
       ceil_div(p.left_columns, 64) * ceil_div(p.right_columns, 64) * p.groups <= kMostPieces &&
       fits(p.left.data, p.rows, p.left_columns, p.left.stride) &&
       fits(p.right.data, p.rows, p.right_columns, p.right.stride);
  const bool transposed = p.transposed && p.result == GroupedGemmParams::Result::kRight;
  const int32_t rows = transposed ? p.left_columns : p.right_columns;
  const int32_t columns = transposed ? p.right_columns : p.left_columns;
  for (int g = 0; ok && g < p.groups; ++g) {
    ok = fits(p.matrix[g], rows, columns, p.matrix_stride[g]) && is_aligned_to(p.bias[g], kWordBytes);
  }
  return ok && compute_capability_cuda() == 90 && tensor_map_encoder() != nullptr;
}

#else

bool grouped_gemm_supports(const GroupedGemmParams&) { return false; }
int launch_grouped_gemm_cuda(const GroupedGemmParams&, CUstream_st*) { return cudaErrorNotSupported; }

#endif

}  // namespace mixture_of_mamba

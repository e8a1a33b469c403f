// SPDX-License-Identifier: Apache-2.0
//
// Host side of the tiles. few_rows_tiles.cuh has the idea.

#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/common/tensor_map.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/few_rows_kernels.h"
#include "kernels/cuda/few_rows_tiles.cuh"

namespace mixture_of_mamba::few_rows {
namespace tiles {
namespace {

// Few out_features are cut into sections of in_features, so that more blocks can be had where there are few
// tiles. With more rows the blocks of a cluster have more to tell each other. So what is added up, and in
// which order, follows from the sizes of a weight and from how many rows there are at most.
int sections_of(const FewRowsParams& p) {
  constexpr int kManyTiles = 64, kFewTiles = 16;
  constexpr int kLeastColumns = 512;  // of a section
  const int64_t tiles = ceil_div(p.out_features, kOut);
  if (tiles >= kManyTiles) return 1;
  const int32_t rows = most_rows(p);
  int sections = tiles < kFewTiles ? (rows <= 64 ? 8 : 4) : (rows <= 32 ? 4 : 2);
  while (sections > 1 && sections * kLeastColumns > p.in_features) sections /= 2;
  return sections;
}

// Rows of y's grid: tiles, as many as there can be, and the padding.
template <typename S>
int64_t row_tiles(const FewRowsParams& p) {
  if (p.offsets != nullptr) return most_row_tiles(p.rows, p.modalities, S::kRows);
  int64_t tiles = p.begin[p.modalities] < p.rows;
  for (int m = 0; m < p.modalities; ++m) tiles += ceil_div(p.begin[m + 1] - p.begin[m], S::kRows);
  return tiles;
}

template <typename T, typename S>
int launch(const FewRowsParams& p, CUstream_st* stream) {
  Params params;
  params.problem = p;
  bool made = make_tensor_map(params.x, p.type, p.x, p.rows, p.in_features, S::kRows);
  for (int m = 0; made && m < p.modalities; ++m) {
    made = make_tensor_map(params.weight[m], p.type, {p.weight[m], p.weight_stride[m]}, p.out_features,
                           p.in_features, kOut);
  }
  if (!made) return cudaErrorInvalidValue;
  const int64_t tiles = ceil_div(p.out_features, kOut), tiles_of_rows = row_tiles<S>(p);
  params.sections = sections_of(p);
  if (params.sections * tiles * tiles_of_rows <= multiprocessors_cuda()) params.parts = params.sections;
  const int64_t stages = ceil_div(ceil_div(p.in_features, S::kColumns), params.parts);
  params.stages = static_cast<int32_t>(std::min<int64_t>(stages, S::kMostStages));
  params.in_words = p.out_features % kWord == 0 &&
                    rows_in_words(p.y.data, p.y.stride, size_of(p.type), kWord * size_of(p.type));
  const auto bytes_of = [](int stages) {
    return std::max(stages * S::kStageBytes, S::kSumBytes) + kAlignment;
  };
  const size_t bytes = bytes_of(params.stages);
  const auto kernel = tiles_kernel<T, S>;
  // The limit is the function's, for all threads of the host: always the same.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes_of(S::kMostStages));
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(tiles * params.parts), static_cast<unsigned>(tiles_of_rows));
  return launch_chained({grid, kThreads, bytes, stream, static_cast<unsigned>(params.parts)}, kernel, params);
}

// Of a small matrix smaller tiles, and more of them.
template <typename T>
int launch_type(const FewRowsParams& p, CUstream_st* stream) {
  const int32_t most = most_rows(p);
  if (most <= 16) return launch<T, Shape<16>>(p, stream);
  if (most <= 32) return launch<T, Shape<32>>(p, stream);
  if (most <= 64 || is_small(p)) return launch<T, Shape<64>>(p, stream);
  if (most <= 96) return launch<T, Shape<96>>(p, stream);
  return launch<T, Shape<kMostTileRows>>(p, stream);
}

}  // namespace
}  // namespace tiles

bool tiles_serve(const FewRowsParams& p) {
  bool ok = p.offsets != nullptr || most_rows(p) <= (is_small(p) ? kMostRowsOfSmall : kMostRows);
  ok = ok && tensor_map_serves(p.rows, p.in_features, p.x.stride);
  for (int m = 0; ok && m < p.modalities; ++m) {
    ok = tensor_map_serves(p.out_features, p.in_features, p.weight_stride[m]);
  }
  return ok && compute_capability_cuda() == 90 && tensor_map_encoder() != nullptr;
}

int launch_tiles(const FewRowsParams& p, CUstream_st* stream) {
  return p.type == ScalarType::kFloat16 ? tiles::launch_type<__half>(p, stream)
                                        : tiles::launch_type<__nv_bfloat16>(p, stream);
}

}  // namespace mixture_of_mamba::few_rows

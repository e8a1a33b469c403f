// SPDX-License-Identifier: Apache-2.0
//
// Host side of the tiles: shapes, and the maps by which the copy engine finds the matrices.
// few_rows_tiles.cuh has the idea.

#include "kernels/cuda/common/launch.h"
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

// The driver's function, or null. It is found at run time, so that nothing links the driver.
auto encode_function() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found)
                                                                         : nullptr;
  }();
  return function;
}

// Tiles of `tile_rows` rows and a swizzled span of columns.
bool make_map(CUtensorMap& map, ScalarType type, const void* data, int64_t rows, int64_t columns,
              int64_t stride, int tile_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(rows > 1 ? stride : columns) * size_of(type)};
  const cuuint32_t tile[] = {kSwizzled, static_cast<cuuint32_t>(tile_rows)}, steps[] = {1, 1};
  const auto element =
      type == ScalarType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode_function()(&map, element, 2, const_cast<void*>(data), sizes, strides, tile, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Rows of y's grid: tiles, as many as there can be, and the padding.
template <typename S>
int64_t row_tiles(const FewRowsParams& p) {
  if (p.offsets != nullptr) return p.rows / S::kRows + std::min(p.modalities, p.rows) + 1;
  int64_t tiles = p.begin[p.modalities] < p.rows;
  for (int m = 0; m < p.modalities; ++m) tiles += ceil_div(p.begin[m + 1] - p.begin[m], S::kRows);
  return tiles;
}

template <typename T, typename S>
int launch(const FewRowsParams& p, CUstream_st* stream) {
  Params params;
  params.problem = p;
  bool made = make_map(params.x, p.type, p.x.data, p.rows, p.in_features, p.x.stride, S::kRows);
  for (int m = 0; made && m < p.modalities; ++m) {
    made = make_map(params.weight[m], p.type, p.weight[m], p.out_features, p.in_features, p.weight_stride[m],
                    kOut);
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

// The copy engine wants rows that do not overlap.
bool has_rows(int64_t count, int64_t stride, int64_t columns) { return count == 1 || stride >= columns; }

}  // namespace
}  // namespace tiles

bool tiles_serve(const FewRowsParams& p) {
  bool ok = p.offsets != nullptr || most_rows(p) <= (is_small(p) ? kMostRowsOfSmall : kMostRows);
  ok = ok && tiles::has_rows(p.rows, p.x.stride, p.in_features);
  for (int m = 0; ok && m < p.modalities; ++m) {
    ok = tiles::has_rows(p.out_features, p.weight_stride[m], p.in_features);
  }
  return ok && compute_capability_cuda() == 90 && tiles::encode_function() != nullptr;
}

int launch_tiles(const FewRowsParams& p, CUstream_st* stream) {
  return p.type == ScalarType::kFloat16 ? tiles::launch_type<__half>(p, stream)
                                        : tiles::launch_type<__nv_bfloat16>(p, stream);
}

}  // namespace mixture_of_mamba::few_rows

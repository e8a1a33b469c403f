// SPDX-License-Identifier: Apache-2.0
//
// Host side of the products of groups of rows: the maps by which the copy engine finds the matrices, how many
// blocks share a tile, the launch. grouped_gemm.cuh has the idea.

#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/common/tensor_map.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/grouped_gemm_kernel.cuh"

namespace mixture_of_mamba {
namespace grouped_gemm {
namespace {

// As many as there can be: the host may not know the boundaries.
int64_t most_tiles(const GroupedGemmParams& p, bool over_rows) {
  if (over_rows) {
    return ceil_div(p.right_columns, kTileRows) * ceil_div(p.left_columns, kTileColumns) * p.groups;
  }
  return most_row_tiles(p.rows, p.groups, kTileRows) * ceil_div(p.right_columns, kTileColumns);
}

// Of so many blocks each, that run at the same time.
int64_t clusters_at_once(int64_t multiprocessors, int blocks) {
  // Of the multiprocessors that share what a cluster needs there are 16 to 18 in the full groups, and fewer
  // in one: of 132 there were places for 15 clusters of 8.
  constexpr int kNeighbours = 16;
  if (blocks == 1) return multiprocessors;
  return std::max<int64_t>(multiprocessors / kNeighbours * (kNeighbours / blocks) - 1, 1);
}

// Blocks of a cluster, or 1 for none: what takes least time, counted in stages. It follows from sizes and the
// device, so that the order of sums does.
int blocks_of_cluster(const GroupedGemmParams& p, bool over_rows) {
  constexpr int kOfTile = 4, kOfCluster = 10;  // to begin and to store; to begin together and to add up
  const int64_t depth = over_rows ? ceil_div(p.rows, p.groups) : p.left_columns;
  // Most groups end with a tile that is not whole.
  const int64_t tiles =
      over_rows ? most_tiles(p, true)
                : (ceil_div(p.rows, kTileRows) + p.groups / 2) * ceil_div(p.right_columns, kTileColumns);
  const int64_t multiprocessors = multiprocessors_cuda();
  int best = 1;
  int64_t least = INT64_MAX;
  for (int blocks = 1; blocks <= kMostBlocks; ++blocks) {
    const int64_t stages = ceil_div(ceil_div(depth, kSpan), blocks) + kOfTile + (blocks > 1 ? kOfCluster : 0);
    const int64_t time = ceil_div(tiles, clusters_at_once(multiprocessors, blocks)) * stages;
    if (time < least) best = blocks, least = time;
  }
  return best;
}

template <Form kForm>
bool make_maps(const GroupedGemmParams& p, Params& params) {
  const auto map = [&](CUtensorMap& map, ConstRows matrix, int64_t rows, int64_t columns, int tile_rows) {
    return make_tensor_map(map, p.type, matrix, rows, columns, tile_rows);
  };
  if constexpr (kForm == Form::kOverRows) {
    return map(params.part_of_left, {p.right.data, p.right.stride}, p.rows, p.right_columns, kSpan) &&
           map(params.right[0], p.left, p.rows, p.left_columns, kSpan);
  }
  bool made = map(params.left, p.left, p.rows, p.left_columns, kTileRows) &&
              map(params.part_of_left, p.left, p.rows, p.left_columns, kPart);
  for (int g = 0; made && g < p.groups; ++g) {
    const ConstRows matrix{p.matrix[g], p.matrix_stride[g]};
    made = kForm == Form::kTransposed
               ? map(params.right[g], matrix, p.left_columns, p.right_columns, kSpan)
               : map(params.right[g], matrix, p.right_columns, p.left_columns, kTileColumns);
  }
  return made;
}

template <typename T, Form kForm>
int launch(const GroupedGemmParams& p, CUstream_st* stream) {
  constexpr bool kOverRows = kForm == Form::kOverRows;
  const bool more = !kOverRows && (p.add || std::any_of(p.bias, p.bias + p.groups,
                                                        [](const void* bias) { return bias != nullptr; }));
  Params params;
  params.problem = p;
  if (!make_maps<kForm>(p, params)) return cudaErrorInvalidValue;
  auto kernel = grouped_gemm_kernel<T, kForm, false>;
  if constexpr (!kOverRows) {
    if (more) kernel = grouped_gemm_kernel<T, kForm, true>;
  }
  params.blocks = blocks_of_cluster(p, kOverRows);
  if (params.blocks > 1) kernel = grouped_gemm_cluster_kernel<T, kForm>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  // Chained although a block is long: shared memory lets only one be on a multiprocessor.
  const int64_t blocks =
      params.blocks == 1 ? multiprocessors_cuda() : most_tiles(p, kOverRows) * params.blocks;
  const dim3 grid(static_cast<unsigned>(blocks));
  return launch_chained({grid, kThreads, kSharedBytes, stream, static_cast<unsigned>(params.blocks)}, kernel,
                        params);
}

template <typename T>
int launch_type(const GroupedGemmParams& p, CUstream_st* stream) {
  if (p.result == GroupedGemmParams::Result::kMatrix) return launch<T, Form::kOverRows>(p, stream);
  return p.transposed ? launch<T, Form::kTransposed>(p, stream) : launch<T, Form::kAlong>(p, stream);
}

}  // namespace
}  // namespace grouped_gemm

int launch_grouped_gemm_cuda(const GroupedGemmParams& p, CUstream_st* stream) {
  return p.type == ScalarType::kFloat16 ? grouped_gemm::launch_type<__half>(p, stream)
                                        : grouped_gemm::launch_type<__nv_bfloat16>(p, stream);
}

}  // namespace mixture_of_mamba

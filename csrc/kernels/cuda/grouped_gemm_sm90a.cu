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

// Rows of a tile: 128 beside 256 columns, which leaves less over where groups end, unless the result is
// narrow.
int rows_of_tile(const GroupedGemmParams& p, bool over_rows) {
  constexpr int kNarrow = 256;
  const bool narrow =
      over_rows ? p.left_columns <= kNarrow || p.right_columns <= kNarrow : p.right_columns <= kNarrow;
  return narrow ? 256 : 128;
}

// Tiles beside each other; of a pair, two are one.
template <typename C>
int64_t tile_columns(const GroupedGemmParams& p) {
  return ceil_div(C::kOverRows ? p.left_columns : p.right_columns, C::kPair * C::kColumns);
}

// As many as there can be: the host may not know the boundaries.
template <typename C>
int64_t most_tiles(const GroupedGemmParams& p) {
  if (C::kOverRows) return ceil_div(p.right_columns, C::kRows) * tile_columns<C>(p) * p.groups;
  return most_row_tiles(p.rows, p.groups, C::kRows) * tile_columns<C>(p);
}

int64_t pairs_at_once(int64_t multiprocessors) { return std::max<int64_t>(multiprocessors / 2, 1); }

// Of so many blocks each, that run at the same time.
int64_t clusters_at_once(int64_t multiprocessors, int blocks) {
  // Of the multiprocessors that share what a cluster needs there are 16 to 18 in the full groups, and fewer
  // in one: of 132 there were places for 15 clusters of 8.
  constexpr int kNeighbours = 16;
  return std::max<int64_t>(multiprocessors / kNeighbours * (kNeighbours / blocks) - 1, 1);
}

template <typename C>
int64_t rounds_of_tiles(const GroupedGemmParams& p, int64_t at_once) {
  // Most groups end with a tile that is not whole.
  const int64_t rows = ceil_div(p.rows, C::kRows) + p.groups / 2;
  return ceil_div(C::kOverRows ? most_tiles<C>(p) : rows * tile_columns<C>(p), at_once);
}

// Blocks that share a tile, or 1 for pairs: what takes least time, counted in stages. It follows from sizes
// and the device, so that the order of sums does.
template <typename Pairs, typename Cluster>
int blocks_of_tile(const GroupedGemmParams& p, int64_t multiprocessors) {
  constexpr int kOfTile = 4, kOfCluster = 10;  // to begin and to store; to begin together and to add up
  const int64_t depth = Pairs::kOverRows ? ceil_div(p.rows, p.groups) : p.left_columns;
  const int64_t stages = ceil_div(depth, kSpan);
  int best = 1;
  int64_t least = rounds_of_tiles<Pairs>(p, pairs_at_once(multiprocessors)) * (stages + kOfTile);
  for (int blocks = 2; blocks <= kMostBlocks; ++blocks) {
    const int64_t time = rounds_of_tiles<Cluster>(p, clusters_at_once(multiprocessors, blocks)) *
                         (ceil_div(stages, blocks) + kOfTile + kOfCluster);
    if (time < least) best = blocks, least = time;
  }
  return best;
}

template <typename C>
bool make_maps(const GroupedGemmParams& p, Params& params) {
  const auto map = [&](CUtensorMap& map, ConstRows matrix, int64_t rows, int64_t columns, int tile_rows) {
    return make_tensor_map(map, p.type, matrix, rows, columns, tile_rows);
  };
  const ConstRows result{p.right.data, p.right.stride};
  if constexpr (C::kOverRows) {
    return map(params.part_of_left, result, p.rows, p.right_columns, kSpan) &&
           map(params.right[0], p.left, p.rows, p.left_columns, kSpan);
  }
  bool made = map(params.part_of_left, p.left, p.rows, p.left_columns, kPart) &&
              map(params.half_of_left, p.left, p.rows, p.left_columns, C::kRows / 2) &&
              (!p.add || map(params.part_of_sum, result, p.rows, p.right_columns, kPart));
  for (int g = 0; made && g < p.groups; ++g) {
    const ConstRows matrix{p.matrix[g], p.matrix_stride[g]};
    made = C::kForm == Form::kTransposed
               ? map(params.right[g], matrix, p.left_columns, p.right_columns, kSpan)
               : map(params.right[g], matrix, p.right_columns, p.left_columns, C::kColumns);
  }
  return made;
}

// Chained although a block is long: shared memory lets only one be on a multiprocessor.
int launch_kernel(void (*kernel)(Params), const Params& params, int64_t blocks, int cluster,
                  CUstream_st* stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_chained(
      {dim3(static_cast<unsigned>(blocks)), kThreads, kSharedBytes, stream, static_cast<unsigned>(cluster)},
      kernel, params);
}

template <typename T, Form kForm, int kRows>
int launch_tiles(const GroupedGemmParams& p, CUstream_st* stream) {
  using Pairs = Config<T, kForm, kRows, false>;
  using Cluster = Config<T, kForm, kRows, true>;
  const int64_t multiprocessors = multiprocessors_cuda();
  Params params;
  params.problem = p;
  params.blocks = blocks_of_tile<Pairs, Cluster>(p, multiprocessors);
  if (!make_maps<Pairs>(p, params)) return cudaErrorInvalidValue;
  if (params.blocks > 1) {
    return launch_kernel(grouped_gemm_cluster_kernel<Cluster>, params, most_tiles<Cluster>(p) * params.blocks,
                         params.blocks, stream);
  }
  auto kernel = grouped_gemm_kernel<Pairs, false>;
  if constexpr (!Pairs::kOverRows) {
    const auto there = [](const void* bias) { return bias != nullptr; };
    if (p.add || std::any_of(p.bias, p.bias + p.groups, there)) kernel = grouped_gemm_kernel<Pairs, true>;
  }
  return launch_kernel(kernel, params, pairs_at_once(multiprocessors) * Pairs::kPair, Pairs::kPair, stream);
}

template <typename T, Form kForm>
int launch(const GroupedGemmParams& p, CUstream_st* stream) {
  return rows_of_tile(p, kForm == Form::kOverRows) == 256 ? launch_tiles<T, kForm, 256>(p, stream)
                                                          : launch_tiles<T, kForm, 128>(p, stream);
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

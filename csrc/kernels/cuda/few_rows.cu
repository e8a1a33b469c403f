// SPDX-License-Identifier: Apache-2.0
//
// Host side of the projections of few rows: what is served, by which of the two kernels, and how that of
// few_rows_kernel.cuh is cut.

#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/few_rows_kernel.cuh"
#include "kernels/cuda/few_rows_tiles.h"

namespace mixture_of_mamba {
namespace few_rows {
namespace {

constexpr int kMostParts = 8;  // of in_features: a cluster of more blocks is not portable

// Of one modality, as far as the host knows.
int32_t most_rows(const FewRowsParams& p) {
  if (p.offsets != nullptr) return p.rows;
  int32_t most = 0;
  for (int m = 0; m < p.modalities; ++m) most = std::max(most, p.begin[m + 1] - p.begin[m]);
  return most;
}

// How the features are cut. Narrow tiles where wide ones would leave multiprocessors idle; then parts, of
// which every warp has at least a chunk. Where wide tiles are possible there is one part either way, so what
// a warp adds up follows from the sizes of a weight alone.
struct Cut {
  bool wide = false;
  int tiles = 0, parts = 1;
};

Cut cut(const FewRowsParams& p, bool may_be_wide) {
  const int64_t processors = multiprocessors_cuda();
  Cut cut;
  cut.wide = may_be_wide && 4 * ceil_div(p.out_features, kWide) >= 3 * processors;
  cut.tiles = static_cast<int>(ceil_div(p.out_features, cut.wide ? kWide : kNarrow));
  const auto fits = [&](int64_t parts) {
    return parts * cut.tiles <= processors && parts * kWarps * kChunk <= p.in_features;
  };
  while (cut.parts < kMostParts && fits(2 * cut.parts)) cut.parts *= 2;
  return cut;
}

template <typename T, typename S>
int launch(const FewRowsParams& p, const Cut& cut, CUstream_st* stream) {
  const bool padding = p.offsets != nullptr || p.begin[p.modalities] < p.rows;
  const dim3 grid(cut.tiles * cut.parts, p.modalities + padding);
  return launch_chained({grid, kThreads, 0, stream, static_cast<unsigned>(cut.parts)}, few_rows_kernel<T, S>,
                        p);
}

template <typename T>
int launch_type(const FewRowsParams& p, CUstream_st* stream) {
  const int32_t most = most_rows(p);
  const Cut made = cut(p, most <= 32);
  if (made.wide) {
    if (most <= 8) return launch<T, Shape<kWide, 1, 2>>(p, made, stream);
    if (most <= 16) return launch<T, Shape<kWide, 2, 2>>(p, made, stream);
    return launch<T, Shape<kWide, 4, 2>>(p, made, stream);
  }
  if (most <= 8) return launch<T, Shape<kNarrow, 1, 4>>(p, made, stream);
  if (most <= 16) return launch<T, Shape<kNarrow, 2, 4>>(p, made, stream);
  if (most <= 32) return launch<T, Shape<kNarrow, 4, 3>>(p, made, stream);
  return launch<T, Shape<kNarrow, 8, 2>>(p, made, stream);
}

enum class Kernel { kNone, kDirect, kTiles };

// Limits are rows of one modality. Above them cuBLAS is as fast.
Kernel kernel_for(const FewRowsParams& p) {
  const int32_t rows = most_rows(p);
#ifdef MOM_SM90A
  if (tiles_support(p)) {
    constexpr int kFewTiles = 32;
    if (is_small(p) && ceil_div(p.out_features, kTileOut) < kFewTiles && rows <= 64) return Kernel::kDirect;
    const bool serves = rows <= (is_small(p) ? 2 * kMostTileRows : kMostTileRows) || p.offsets != nullptr;
    return serves ? Kernel::kTiles : Kernel::kNone;
  }
#endif
  return rows <= (is_small(p) ? 64 : 32) ? Kernel::kDirect : Kernel::kNone;
}

}  // namespace
}  // namespace few_rows

bool few_rows_supports(const FewRowsParams& p) {
  const auto words = [&](const void* data, int64_t stride) {
    constexpr int kBytes = 16;
    return rows_in_words(data, stride, size_of(p.type), kBytes);
  };
  bool ok = (p.type == ScalarType::kBFloat16 || p.type == ScalarType::kFloat16) &&
            p.modalities <= FewRowsParams::kMostModalities && p.in_features % few_rows::kWord == 0 &&
            p.in_features > 0 && p.out_features > 0 && words(p.x.data, p.x.stride);
  for (int m = 0; ok && m < p.modalities; ++m) ok = words(p.weight[m], p.weight_stride[m]);
  return ok && compute_capability_cuda() >= 90 && few_rows::kernel_for(p) != few_rows::Kernel::kNone;
}

int launch_few_rows_cuda(const FewRowsParams& p, CUstream_st* stream) {
  if (p.rows == 0) return cudaSuccess;
#ifdef MOM_SM90A
  if (few_rows::kernel_for(p) == few_rows::Kernel::kTiles) {
    return few_rows::launch_tiles(p, few_rows::most_rows(p), stream);
  }
#endif
  return p.type == ScalarType::kFloat16 ? few_rows::launch_type<__half>(p, stream)
                                        : few_rows::launch_type<__nv_bfloat16>(p, stream);
}

}  // namespace mixture_of_mamba

// SPDX-License-Identifier: Apache-2.0
//
// Host side of the direct kernel: how the features are cut. few_rows_direct.cuh has the idea.

#include "kernels/cuda/common/launch.h"
#include "kernels/cuda/device_info.h"
#include "kernels/cuda/few_rows_direct.cuh"
#include "kernels/cuda/few_rows_kernels.h"

namespace mixture_of_mamba::few_rows {
namespace {

constexpr int kMostParts = 8;  // of in_features: a cluster of more blocks is not portable

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
  return launch_chained({grid, kThreads, 0, stream, static_cast<unsigned>(cut.parts)}, direct_kernel<T, S>,
                        p);
}

template <typename T>
int launch_type(const FewRowsParams& p, CUstream_st* stream) {
  const int32_t most = most_rows(p);
  const Cut made = cut(p, most <= kMostDirectRows);
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

}  // namespace

bool direct_serves(const FewRowsParams& p) {
  return most_rows(p) <= (is_small(p) ? kMostDirectRowsOfSmall : kMostDirectRows) &&
         compiled_capability_cuda() >= 90;
}

int launch_direct(const FewRowsParams& p, CUstream_st* stream) {
  return p.type == ScalarType::kFloat16 ? launch_type<__half>(p, stream)
                                        : launch_type<__nv_bfloat16>(p, stream);
}

}  // namespace mixture_of_mamba::few_rows

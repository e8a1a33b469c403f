// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "kernels/few_rows.h"

// The two kernels for projections of few rows. Where tiles serve they are taken: as fast
// within a few percent for one row, faster from there on. Both take what
// few_rows_supports() has found fit: 16 bits, addresses in whole words.

namespace mixture_of_mamba::few_rows {

// Of one modality, as far as the host knows.
inline int32_t most_rows(const FewRowsParams& p) {
  if (p.offsets != nullptr) return p.rows;
  int32_t most = 0;
  for (int m = 0; m < p.modalities; ++m) most = std::max(most, p.begin[m + 1] - p.begin[m]);
  return most;
}

// A matrix whose x is small too.
inline bool is_small(const FewRowsParams& p) { return int64_t{p.in_features} * p.out_features <= 1 << 20; }

// Straight into registers; compute capability 9.0 and up. Above these rows x should be shared by more
// out_features than a block has.
constexpr int kMostDirectRows = 32, kMostDirectRowsOfSmall = 64;
bool direct_serves(const FewRowsParams&);
int launch_direct(const FewRowsParams&, CUstream_st* stream);

// Tiles of 64 out_features and up to 128 rows through shared memory; compute capability 9.0 alone, and only
// where the library is built for it (MOM_SM90A). Above these rows cuBLAS is about as fast; but not
// where boundaries are on the device.
constexpr int kTileOut = 64, kMostTileRows = 128;
constexpr int kMostRows = 128, kMostRowsOfSmall = 256;
bool tiles_serve(const FewRowsParams&);
int launch_tiles(const FewRowsParams&, CUstream_st* stream);

}  // namespace mixture_of_mamba::few_rows

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/few_rows.h"

// The second kernel for projections of few rows: tiles through shared memory, for more rows and many
// out_features, on compute capability 9.0. Built where that is among the architectures (MOM_SM90A).

namespace mixture_of_mamba::few_rows {

constexpr int kMostTileRows = 128;  // of a tile
constexpr int kTileOut = 64;        // out_features of a tile

// A matrix whose x is small too.
inline bool is_small(const FewRowsParams& p) { return int64_t{p.in_features} * p.out_features <= 1 << 20; }

// Whether the device and the strides allow it; types and addresses were looked at already.
bool tiles_support(const FewRowsParams&);
// most_rows: of one modality, as far as the host knows; of more than kMostTileRows there are several tiles.
int launch_tiles(const FewRowsParams&, int32_t most_rows, CUstream_st* stream);

}  // namespace mixture_of_mamba::few_rows

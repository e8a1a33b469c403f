// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/selective_scan.h"

// The forward scan of a few tokens, as in decoding, where the states are nearly all there is to move.

namespace mixture_of_mamba {

// Whether launch_scan_step() takes the call; looks at sizes alone.
bool scan_step_supports(const SelectiveScanForwardParams& p);
// Needs no workspace. Returns a cudaError_t.
int launch_scan_step(const SelectiveScanForwardParams& p, CUstream_st* stream);

}  // namespace mixture_of_mamba

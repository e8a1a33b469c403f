// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace mixture_of_mamba {

// Of the current device: 10 * major + minor, and the number of multiprocessors.
int compute_capability_cuda();
int multiprocessors_cuda();
// Whether a kernel may be launched while the one before it ends (common/chained.cuh), also under capture.
bool chained_launches_cuda();

}  // namespace mixture_of_mamba

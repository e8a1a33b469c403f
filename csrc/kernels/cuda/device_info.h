// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace mixture_of_mamba {

// Of the current device: 10 * major + minor, and the number of multiprocessors.
int compute_capability_cuda();
int multiprocessors_cuda();
// What the kernels are compiled for where the current device runs them: less than its own capability where
// that is PTX of an older architecture. Code that asks __CUDA_ARCH__ is there from this on.
int compiled_capability_cuda();
// Whether a kernel may be launched while the one before it ends (common/chained.cuh), also under capture.
bool chained_launches_cuda();

}  // namespace mixture_of_mamba

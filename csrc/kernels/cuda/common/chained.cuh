// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "kernels/cuda/device_info.h"

// Kernels of one operator follow each other on a stream, and between two of them a multiprocessor idles for
// about a microsecond. Where device and code can (compute capability 9.0 and up), a chained kernel is brought
// onto the multiprocessors while the one before it ends, and waits there:
//
//   wait_for_previous()  in every block, also one without work, and by every thread before it touches
//                        anything that earlier work touches (or behind a barrier after a thread that did).
//                        From here on all work before this kernel is done and visible. A kernel that did not
//                        wait could end early, and the next one with it.
//   let_next_begin()     by every block, at any time: the next kernel's blocks may take free places
//
// A kernel that is launched in another way finds both without effect. Chaining is for short kernels: blocks
// that come early go where there is place at that moment, so a kernel of about one long block a
// multiprocessor would lie unevenly (the scan after a convolution: 386 instead of 166 microseconds), unless
// it takes all places.

namespace mixture_of_mamba {

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// For a kernel with nothing to do in advance.
__device__ __forceinline__ void follow_previous() {
  let_next_begin();
  wait_for_previous();
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  CUstream_st* stream = nullptr;
  unsigned cluster = 1;  // neighbouring blocks of the grid that run at the same time
};

template <typename... Parameters, typename... Arguments>
int launch_chained(const Launch& launch, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (chained_launches_cuda()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (launch.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {launch.cluster, 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid, config.blockDim = launch.block;
  config.dynamicSmemBytes = launch.shared_bytes, config.stream = launch.stream;
  config.attrs = attributes, config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace mixture_of_mamba

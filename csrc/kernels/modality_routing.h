// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/common/parallel.h"

// Stable counting sort of tokens by modality. ids outside 0 .. num_modalities - 1 are padding and
// sort last.
//   rows    [tokens]              time -> sorted row
//   order   [tokens]              sorted row -> time (the inverse)
//   offsets [num_modalities + 1]  first row of each modality; the last entry counts the rows that are
//                                 not padding

struct CUstream_st;

namespace mixture_of_mamba {

constexpr int64_t kMaxModalities = 1024;  // bounds the shared histogram of the CUDA kernel

struct ModalityRoutingParams {
  const int64_t* ids = nullptr;  // [tokens]
  int64_t tokens = 0;            // < 2^31
  int32_t num_modalities = 1;    // 1 .. kMaxModalities
  int32_t* rows = nullptr;
  int32_t* order = nullptr;
  int32_t* offsets = nullptr;
};

void run_modality_routing_cpu(const ModalityRoutingParams&, ParallelFor);

size_t modality_routing_workspace_cuda(const ModalityRoutingParams&);
int launch_modality_routing_cuda(const ModalityRoutingParams&, void* workspace, CUstream_st* stream);

}  // namespace mixture_of_mamba

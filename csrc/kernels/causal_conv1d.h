// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "kernels/common/packing.h"
#include "kernels/common/parallel.h"
#include "kernels/common/scalar_type.h"

// Depthwise causal convolution over the tokens of a sequence in time order:
//
//   pre[t] = bias + sum_{k=0}^{width-1} weight[k] * x[t - (width - 1) + k]
//   y[t]   = silu(pre[t])  or  pre[t]
//
// x before the first token comes from initial_state [sequences, width - 1, channels] (oldest first), or
// is zero. Padding rows are skipped as if they were not there: y = 0, gradient 0, and the window of a
// later token reaches over them. final_state holds the last width - 1 inputs of the sequence that are
// not padding (with initial_state before them when there are fewer).

struct CUstream_st;

namespace mixture_of_mamba {

// "acc" is float, or double when type is kFloat64 (CPU only).
struct CausalConv1dParams {
  ScalarType type = ScalarType::kFloat32;  // of x, y, states and their gradients
  int64_t channels = 0;
  int64_t width = 0;  // >= 1
  TokenOrder order;
  bool silu = false;

  ConstRows x;                          // [tokens, channels]
  const void* weight = nullptr;         // acc [channels, width], contiguous
  const void* bias = nullptr;           // acc [channels] or null
  const void* initial_state = nullptr;  // type [sequences, width - 1, channels] or null
};

struct CausalConv1dForwardParams : CausalConv1dParams {
  Rows y;                       // [tokens, channels]; every row is written
  void* final_state = nullptr;  // type [sequences, width - 1, channels] or null; may be initial_state
                                // itself, also when a sequence is shorter than the window
  bool settled_state = false;   // as in selective_scan.h
};

struct CausalConv1dBackwardParams : CausalConv1dParams {
  ConstRows grad_y;                        // [tokens, channels]
  const void* grad_final_state = nullptr;  // type [sequences, width - 1, channels] or null (zero)

  Rows grad_x;                         // [tokens, channels]; every row is written
  void* grad_weight = nullptr;         // acc [channels, width]
  void* grad_bias = nullptr;           // acc [channels] or null
  void* grad_initial_state = nullptr;  // type [sequences, width - 1, channels] or null
};

void run_causal_conv1d_forward_cpu(const CausalConv1dForwardParams&, ParallelFor);
void run_causal_conv1d_backward_cpu(const CausalConv1dBackwardParams&, ParallelFor);

// CUDA: see selective_scan.h for the meaning of workspace, stream and the returned cudaError_t.
size_t causal_conv1d_forward_workspace_cuda(const CausalConv1dForwardParams&);
int launch_causal_conv1d_forward_cuda(const CausalConv1dForwardParams&, void* workspace, CUstream_st* stream);
size_t causal_conv1d_backward_workspace_cuda(const CausalConv1dBackwardParams&);
int launch_causal_conv1d_backward_cuda(const CausalConv1dBackwardParams&, void* workspace,
                                       CUstream_st* stream);

}  // namespace mixture_of_mamba

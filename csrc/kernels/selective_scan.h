// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "kernels/common/packing.h"
#include "kernels/common/parallel.h"
#include "kernels/common/scalar_type.h"

// Modality-masked selective scan (Mamba, arXiv 2312.00752, algorithm 2; Mixture-of-Mamba, 2501.16295).
// For every sequence and channel, over its tokens in time order (or against it, `reverse`):
//
//   delta = softplus(dt + dt_bias[modality])        (without softplus: dt + dt_bias)
//   h     = exp(delta * A) * h + delta * u * B      h has `states` entries
//   y     = dot(C, h) + D * u
//   out   = y * silu(z)
//
// Padding rows leave h as it is and get out = 0 and zero gradients.

struct CUstream_st;

namespace mixture_of_mamba {

// The state before every kCheckpointInterval-th token of a sequence is kept for backward. Tile i of
// sequence s has slot sequence_begin(s) / interval + s + i (walk order: tile 0 holds the tokens walked
// first), so selective_scan_checkpoint_slots() slots hold every tile of every packing.
constexpr int64_t kCheckpointInterval = 16;

MOM_HOST_DEVICE int64_t selective_scan_checkpoint_slots(int64_t tokens, int64_t sequences) {
  return tokens / kCheckpointInterval + sequences;
}

// "acc" is float, or double when type is kFloat64 (CPU only).
struct SelectiveScanParams {
  ScalarType type = ScalarType::kFloat32;  // of u, dt, B, C, z, out and their gradients
  int64_t channels = 0;
  int64_t states = 0;
  TokenOrder order;
  bool softplus = false;
  bool reverse = false;

  ConstRows u, dt;                      // [tokens, channels]
  ConstRows B, C;                       // [tokens, states]
  ConstRows z;                          // [tokens, channels] or absent
  const void* A = nullptr;              // acc [channels, states], contiguous
  const void* D = nullptr;              // acc [channels] or null
  const void* dt_bias = nullptr;        // acc [bias_modalities, channels] or null
  int32_t bias_modalities = 0;          // 1: shared by all; order.modalities: one row per modality
  const void* initial_state = nullptr;  // acc [sequences, channels, states] or null (zero)
};

struct SelectiveScanForwardParams : SelectiveScanParams {
  Rows out;                     // [tokens, channels]; every row is written, padding rows with 0
  void* final_state = nullptr;  // acc [sequences, channels, states] or null; may be initial_state itself
  // acc, selective_scan_checkpoint_slots() * channels * states elements, or null. The layout inside
  // is the backend's own; slots of no tile stay unwritten.
  void* checkpoints = nullptr;
  // Equal bit by bit with and without checkpoints. Else a few tokens without may have kernels of their own.
  bool for_training = false;
  // initial_state and final_state are of `type`, not acc. Only where a backend says that it takes them so.
  bool narrow_state = false;
  // Whether initial_state and the order of the tokens were written before the kernels on the stream that may
  // still be running (Settled in few_rows.h).
  bool settled_state = false;
};

struct SelectiveScanBackwardParams : SelectiveScanParams {
  ConstRows grad_out;                      // [tokens, channels]
  const void* grad_final_state = nullptr;  // acc [sequences, channels, states] or null (zero)
  const void* checkpoints = nullptr;       // as forward left them; required

  // Every element of every output given is written. Absent (null) outputs are not computed.
  Rows grad_u, grad_dt;                // [tokens, channels]
  Rows grad_B, grad_C;                 // [tokens, states]
  Rows grad_z;                         // [tokens, channels]; present exactly when z is
  void* grad_A = nullptr;              // acc [channels, states]
  void* grad_D = nullptr;              // acc [channels]; present exactly when D is
  void* grad_dt_bias = nullptr;        // acc [bias_modalities, channels]; exactly when dt_bias is
  void* grad_initial_state = nullptr;  // acc [sequences, channels, states] or null
  // Not a gradient: forward's out once more, which falls off on the way. Only with z.
  Rows out;  // [tokens, channels]
};

void run_selective_scan_forward_cpu(const SelectiveScanForwardParams&, ParallelFor);
void run_selective_scan_backward_cpu(const SelectiveScanBackwardParams&, ParallelFor);

// CUDA: `workspace` is device memory of at least the returned number of bytes, 256-byte aligned.
// Launches on `stream` and returns without waiting. The caller has set the device.
// Returns a cudaError_t as int (0: success).
size_t selective_scan_forward_workspace_cuda(const SelectiveScanForwardParams&);
int launch_selective_scan_forward_cuda(const SelectiveScanForwardParams&, void* workspace,
                                       CUstream_st* stream);
size_t selective_scan_backward_workspace_cuda(const SelectiveScanBackwardParams&);
int launch_selective_scan_backward_cuda(const SelectiveScanBackwardParams&, void* workspace,
                                        CUstream_st* stream);
// Whether forward may be launched with narrow_state; looks at sizes alone.
bool selective_scan_takes_narrow_state_cuda(const SelectiveScanForwardParams&);

}  // namespace mixture_of_mamba

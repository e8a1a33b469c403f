// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include "kernels/causal_conv1d.h"
#include "kernels/conversions.h"
#include "kernels/few_rows.h"
#include "kernels/grouped_gemm.h"
#include "kernels/grouped_linear.h"
#include "kernels/modality_routing.h"
#include "kernels/permute_rows.h"
#include "kernels/selective_scan.h"
#include "ops/common.h"
#include "ops/products.h"

namespace mixture_of_mamba::ops {

// Launches kernels on the current stream of the reference tensor's device, with workspace from
// torch's caching allocator (ordered by the stream, so it may be released right after the launch).
class CudaBackend {
 public:
  explicit CudaBackend(const Tensor& reference)
      : reference_(reference), guard_(reference.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(reference.get_device_index(), &stream));
    stream_ = static_cast<CUstream_st*>(stream);
  }

  static const Products& products();

  static bool takes_narrow_state(const SelectiveScanForwardParams& p) {
    return selective_scan_takes_narrow_state_cuda(p);
  }
  void run(const SelectiveScanForwardParams& p) const {
    with_workspace(selective_scan_forward_workspace_cuda(p),
                   [&](void* w) { return launch_selective_scan_forward_cuda(p, w, stream_); });
  }
  void run(const SelectiveScanBackwardParams& p) const {
    with_workspace(selective_scan_backward_workspace_cuda(p),
                   [&](void* w) { return launch_selective_scan_backward_cuda(p, w, stream_); });
  }
  void run(const CausalConv1dForwardParams& p) const {
    with_workspace(causal_conv1d_forward_workspace_cuda(p),
                   [&](void* w) { return launch_causal_conv1d_forward_cuda(p, w, stream_); });
  }
  void run(const CausalConv1dBackwardParams& p) const {
    with_workspace(causal_conv1d_backward_workspace_cuda(p),
                   [&](void* w) { return launch_causal_conv1d_backward_cuda(p, w, stream_); });
  }
  void run(const ModalityRoutingParams& p) const {
    with_workspace(modality_routing_workspace_cuda(p),
                   [&](void* w) { return launch_modality_routing_cuda(p, w, stream_); });
  }
  void run(const FewRowsParams& p) const { check(launch_few_rows_cuda(p, stream_)); }
  void run(const GroupedGemmParams& p) const { check(launch_grouped_gemm_cuda(p, stream_)); }
  void run(const PermuteRowsParams& p) const { check(launch_permute_rows_cuda(p, stream_)); }
  void run(const ConversionsParams& p) const { check(launch_conversions_cuda(p, stream_)); }
  void run(const SelectRowsParams& p) const { check(launch_select_rows_cuda(p, stream_)); }
  void run(const FinishRowsParams& p) const { check(launch_finish_rows_cuda(p, stream_)); }
  void run(const SumRowsParams& p) const {
    with_workspace(sum_rows_workspace_cuda(p), [&](void* w) { return launch_sum_rows_cuda(p, w, stream_); });
  }

 private:
  template <typename Launch>
  void with_workspace(size_t bytes, Launch&& launch) const {
    if (bytes == 0) return check(launch(nullptr));
    const Tensor workspace = empty_like_device(reference_, {static_cast<int64_t>(bytes)}, Dtype::Byte);
    check(launch(workspace.mutable_data_ptr()));
  }

  static void check(int error) {
    if (error == 0) return;
    char* message = nullptr;
    torch_c10_cuda_check_msg(error, __FILE__, __func__, __LINE__, true, &message);
    const std::string text = message ? message : "CUDA error " + std::to_string(error);
    if (message) torch_c10_cuda_free_error_msg(message);
    throw std::runtime_error(text);
  }

  const Tensor& reference_;
  torch::stable::accelerator::DeviceGuard guard_;
  CUstream_st* stream_ = nullptr;
};

}  // namespace mixture_of_mamba::ops

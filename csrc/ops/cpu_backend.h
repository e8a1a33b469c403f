// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include "kernels/causal_conv1d.h"
#include "kernels/conversions.h"
#include "kernels/modality_routing.h"
#include "kernels/permute_rows.h"
#include "kernels/selective_scan.h"
#include "ops/common.h"
#include "ops/products.h"

namespace mixture_of_mamba::ops {

// Runs kernels on torch's thread pool.
class CpuBackend {
 public:
  explicit CpuBackend(const Tensor&) {}

  static const Products& products() {
    static constexpr Products functions{aoti_torch_cpu_mm_out, aoti_torch_cpu_addmm_out};
    return functions;
  }

  static bool takes_narrow_state(const SelectiveScanForwardParams&) { return false; }
  void run(const SelectiveScanForwardParams& p) const { run_selective_scan_forward_cpu(p, pool()); }
  void run(const SelectiveScanBackwardParams& p) const { run_selective_scan_backward_cpu(p, pool()); }
  void run(const CausalConv1dForwardParams& p) const { run_causal_conv1d_forward_cpu(p, pool()); }
  void run(const CausalConv1dBackwardParams& p) const { run_causal_conv1d_backward_cpu(p, pool()); }
  void run(const ModalityRoutingParams& p) const { run_modality_routing_cpu(p, pool()); }
  void run(const PermuteRowsParams& p) const { run_permute_rows_cpu(p, pool()); }
  void run(const ConversionsParams& p) const { run_conversions_cpu(p, pool()); }

 private:
  static ParallelFor pool() {
    return {[](int64_t begin, int64_t end, int64_t grain, void* context, ParallelFor::Body body) {
      torch::stable::parallel_for(begin, end, grain,
                                  [context, body](int64_t b, int64_t e) { body(context, b, e); });
    }};
  }
};

}  // namespace mixture_of_mamba::ops

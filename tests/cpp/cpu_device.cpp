// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <cstring>

#include "device.h"
#include "kernels/cpu/dispatch.h"

namespace mixture_of_mamba::testing {

const char* reason_to_skip() {
  const char* wanted = std::getenv("MOM_CPU_ISA");
  if (wanted == nullptr) return nullptr;
  if (std::strcmp(wanted, "avx2") == 0 && !isa_available(Isa::kAvx2)) return "this processor has no AVX2";
  if (std::strcmp(wanted, "avx512") == 0 && !isa_available(Isa::kAvx512)) {
    return "this processor has no AVX-512";
  }
  return nullptr;
}

const Device& device() {
  static const Device cpu = [] {
    Device device;
    device.has_float64 = true;
    device.float32 = device.half = {4e-6L, 2e-5L};
    device.float64 = {1e-14L, 5e-14L};
    device.new_arena = [] { return std::make_unique<HostArena>(); };
    for (const ParallelFor& parallel : {kSerial, kPieces}) {
      device.scan.push_back({"cpu", [=](const auto& p) { run_selective_scan_forward_cpu(p, parallel); },
                             [=](const auto& p) { run_selective_scan_backward_cpu(p, parallel); }});
      device.conv.push_back({"cpu", [=](const auto& p) { run_causal_conv1d_forward_cpu(p, parallel); },
                             [=](const auto& p) { run_causal_conv1d_backward_cpu(p, parallel); }});
      device.modality_routing.push_back([=](const auto& p) { run_modality_routing_cpu(p, parallel); });
      device.permute_rows.push_back([=](const auto& p) { run_permute_rows_cpu(p, parallel); });
      device.conversions.push_back([=](const auto& p) { run_conversions_cpu(p, parallel); });
    }
    return device;
  }();
  return cpu;
}

}  // namespace mixture_of_mamba::testing

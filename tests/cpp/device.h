// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "arena.h"
#include "conv_problem.h"
#include "kernels/conversions.h"
#include "kernels/modality_routing.h"
#include "kernels/permute_rows.h"
#include "scan_problem.h"
#include "support.h"

// The kernels that tests run. A test of a kernel is written once; each executable links it with a device()
// of its own.

namespace mixture_of_mamba::testing {

struct Device {
  bool has_float64 = false;
  Tolerance float32, float64, half;  // half: the 16-bit types
  std::function<std::unique_ptr<Arena>()> new_arena;
  // Ways to run each kernel: pieces of work, contents of workspaces, paths for special shapes.
  std::vector<ScanBackend> scan;
  std::vector<ConvBackend> conv;
  std::vector<std::function<void(const ModalityRoutingParams&)>> modality_routing;
  std::vector<std::function<void(const PermuteRowsParams&)>> permute_rows;
  std::vector<std::function<void(const ConversionsParams&)>> conversions;

  Tolerance tolerance(ScalarType type) const {
    return type == ScalarType::kFloat64 ? float64 : type == ScalarType::kFloat32 ? float32 : half;
  }
  std::vector<ScalarType> types() const {
    std::vector<ScalarType> types = {ScalarType::kFloat32, ScalarType::kBFloat16, ScalarType::kFloat16};
    if (has_float64) types.push_back(ScalarType::kFloat64);
    return types;
  }
};

const Device& device();

}  // namespace mixture_of_mamba::testing

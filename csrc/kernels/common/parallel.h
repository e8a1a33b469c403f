// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

// Kernels borrow the caller's thread pool (torch's), so that torch.set_num_threads governs them.
// Results never depend on how [begin, end) is cut: partial sums are kept per fixed block of work.

namespace mixture_of_mamba {

struct ParallelFor {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  // Calls body(context, b, e) on disjoint pieces that cover [begin, end), each at least `grain`.
  void (*run)(int64_t begin, int64_t end, int64_t grain, void* context, Body body) = nullptr;

  template <typename Function>
  void operator()(int64_t begin, int64_t end, int64_t grain, Function&& function) const {
    if (begin >= end) return;
    run(begin, end, grain, &function, [](void* context, int64_t b, int64_t e) {
      (*static_cast<std::remove_reference_t<Function>*>(context))(b, e);
    });
  }
};

}  // namespace mixture_of_mamba

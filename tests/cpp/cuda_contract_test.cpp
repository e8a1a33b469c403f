// SPDX-License-Identifier: Apache-2.0
#include "catch.h"
#include "cuda_device.h"
#include "device.h"

// What only launches on a GPU promise.

namespace mixture_of_mamba::testing {
namespace {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

TEST_CASE("an arena on the GPU notices a write on either side of an allocation", "[support]") {
  if (std::getenv("MOM_TEST_GUARD") != nullptr) return;
  for (int64_t at : {-1280, -1, 100, 1379}) {
    CudaArena arena;
    unsigned char* const bytes = static_cast<unsigned char*>(arena.allocate(100));
    CHECK(reinterpret_cast<uintptr_t>(bytes) % 256 == 0);
    CHECK(arena.intact());
    const unsigned char zero = 0;
    arena.write(bytes + at, &zero, 1);
    CHECK(!arena.intact());
  }
}

TEST_CASE("launches refuse float64 instead of computing something else", "[selective_scan][causal_conv1d]") {
  const auto refuse = [](auto launch) {
    return [=](const auto& params) { CHECK(launch(params, nullptr, nullptr) == kInvalidValue); };
  };
  CudaArena arena;
  ScanProblem::base(ScalarType::kFloat64)
      .run(arena, {"float64", refuse(launch_selective_scan_forward_cuda),
                   refuse(launch_selective_scan_backward_cuda)});
  ConvProblem::base(ScalarType::kFloat64)
      .run(arena, {"float64", refuse(launch_causal_conv1d_forward_cuda),
                   refuse(launch_causal_conv1d_backward_cuda)});
}

}  // namespace
}  // namespace mixture_of_mamba::testing

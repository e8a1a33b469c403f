// SPDX-License-Identifier: Apache-2.0
#include <utility>
#include <vector>

#include "catch.h"
#include "cuda_device.h"
#include "device.h"
#include "kernels/cuda/device_info.h"

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

TEST_CASE("kernels are compiled for the device or for an older one", "[support]") {
  const int compiled = compiled_capability_cuda();
  CHECK(compiled >= 80);
  CHECK(compiled <= compute_capability_cuda());
  CHECK(compiled_capability_cuda() == compiled);
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

int run_forward(const SelectiveScanForwardParams& params) {
  int error = 0;
  run_with_workspace(selective_scan_forward_workspace_cuda(params), kPoison, [&](void* workspace) {
    error = launch_selective_scan_forward_cuda(params, workspace, nullptr);
    return 0;
  });
  return error;
}

// A few tokens of every sequence, and an initial state that 16 bits hold.
ScanProblem step_problem(ScalarType type, int length, int64_t sequences, int64_t channels, int64_t states) {
  ScanProblem p = ScanProblem::base(type);
  p.name = "a state in 16 bits";
  p.tokens.lengths = std::vector<int>(sequences, length);
  p.tokens.padding = p.garbage = true;
  p.channels = channels, p.states = states;
  return p;
}

Reals rounded(Reals values, ScalarType type) {
  for (Real& value : values) value = decode16(type, encode16(type, value));
  return values;
}

// The step in 16 bits beside the one in float, which is right.
void check_narrow_state(const ScanProblem& problem, bool with_reference) {
  INFO(problem.describe());
  Outputs both[2];
  for (const bool narrow : {false, true}) {
    CudaArena arena;
    both[narrow] = problem.run_step(
        arena, [](const SelectiveScanForwardParams& params) { check_cuda(run_forward(params), "step"); },
        narrow);
    CHECK(arena.intact());
  }
  const Output &wide = both[0][1], &narrow = both[1][1];
  CHECK(narrow.type == problem.type);
  CHECK(narrow.values == rounded(wide.values, problem.type));
  Outputs expected = both[0];
  if (with_reference) expected = problem.reference();
  CHECK(mismatch(both[1], expected, problem.type, device().tolerance(problem.type)) == "");
}

TEST_CASE("a step with its state in 16 bits is the one in float, rounded once", "[selective_scan]") {
  for (ScalarType type : {ScalarType::kBFloat16, ScalarType::kFloat16}) {
    for (int states : {1, 4, 5, 8, 12, 16, 17, 32, 64, 128}) {
      for (int length : {1, 2, 4}) {
        for (int unaligned : {0, 1}) {
          ScanProblem p = step_problem(type, length, 5, 67, states);
          p.gap = p.offset = unaligned;
          Random random(states + length);
          p.fill(random);
          p.initial_values = rounded(p.initial_values, type);
          check_narrow_state(p, true);
        }
      }
    }
    // More sequences than threads go through at once.
    ScanProblem p = step_problem(type, 1, 100, 2048, 16);
    Random random(0);
    p.fill(random);
    p.initial_values = rounded(p.initial_values, type);
    check_narrow_state(p, false);
  }
}

TEST_CASE("launches refuse a state in 16 bits where no kernel takes it", "[selective_scan]") {
  for (const auto& [length, states] : {std::pair{5, 16}, std::pair{1, 129}, std::pair{0, 16}}) {
    ScanProblem p = step_problem(ScalarType::kBFloat16, length, 2, 8, states);
    Random random(0);
    p.fill(random);
    CudaArena arena;
    p.run_step(
        arena,
        [](const SelectiveScanForwardParams& params) {
          CHECK(!selective_scan_takes_narrow_state_cuda(params));
          CHECK(run_forward(params) == kInvalidValue);
        },
        true);
  }
}

}  // namespace
}  // namespace mixture_of_mamba::testing

// SPDX-License-Identifier: Apache-2.0
//
// The scan's backward on a GPU against float64 loops on the host: every gradient, a table of cases and
// random ones over the whole contract. A standalone program, built from this file and
// csrc/kernels/cuda/*.cu; exit status 0: all well.
//
//   scan_backward_cuda_test [random cases] [seed]    check
//   scan_backward_cuda_test few                      every 7th case of the table: for compute-sanitizer
//   scan_backward_cuda_test bench                    median times of both paths

#include "kernels/cuda/selective_scan_bwd.h"
#include "scan_backward_reference.cuh"

namespace mixture_of_mamba {
namespace {

std::vector<float> floats(const Doubles& v) { return {v.begin(), v.end()}; }

// The worst of: relative L2 error / tolerance, and largest error / (50 tolerances of rms + |expected|).
double error_of(const Doubles& got, const Doubles& expected, double tolerance) {
  double difference = 0, norm = 0, worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(got[i])) return INFINITY;
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  if (norm == 0) return difference == 0 ? 0 : INFINITY;
  const double rms = std::sqrt(norm / got.size());
  for (size_t i = 0; i < got.size(); ++i) {
    worst =
        std::max(worst, std::fabs(got[i] - expected[i]) / (50 * tolerance * (rms + std::fabs(expected[i]))));
  }
  return std::max(worst, std::sqrt(difference / norm) / tolerance);
}

using Workspace = size_t (*)(const SelectiveScanBackwardParams&);
using Launch = int (*)(const SelectiveScanBackwardParams&, void*, CUstream_st*);

double largest[2][kOutputs];  // of all cases: fp32, 16-bit

bool run_case(const Case& c, Workspace workspace_of, Launch launch, const char* path) {
  Problem problem(c);
  Device device;
  SelectiveScanBackwardParams p;
  const int64_t tokens = problem.tokens, sequences = problem.sequences, size = c.channels * c.states;
  p.type = c.type;
  p.channels = c.channels;
  p.states = c.states;
  p.softplus = c.softplus;
  p.reverse = c.reverse;
  p.order.rows = c.rows ? device.upload(problem.rows) : nullptr;
  p.order.offsets = c.rows ? device.upload(problem.offsets) : nullptr;
  p.order.modalities = c.rows ? c.modalities : 1;
  p.order.cu_seqlens = c.packed ? device.upload(problem.cu_seqlens) : nullptr;
  p.order.tokens = tokens;
  p.order.sequences = sequences;
  p.order.length = c.packed || c.lengths.empty() ? 0 : c.lengths[0];
  const auto input = [&](const Doubles& values, int64_t columns) {
    Matrix matrix(device, c, c.type, tokens, columns);
    matrix.write(values);
    return ConstRows{matrix.data(), matrix.stride};
  };
  p.u = input(problem.u, c.channels);
  p.dt = input(problem.dt, c.channels);
  p.B = input(problem.B, c.states);
  p.C = input(problem.C, c.states);
  if (c.z) p.z = input(problem.z, c.channels);
  p.grad_out = input(problem.grad_out, c.channels);
  p.A = device.upload(floats(problem.A));
  if (c.D) p.D = device.upload(floats(problem.D));
  if (c.bias_modalities > 0) p.dt_bias = device.upload(floats(problem.bias));
  p.bias_modalities = c.bias_modalities;
  if (c.initial) p.initial_state = device.upload(floats(problem.initial));
  if (c.grad_final) p.grad_final_state = device.upload(floats(problem.grad_final));
  p.checkpoints = device.upload(problem.checkpoints);

  const Case dense;
  Matrix outputs[kOutputs] = {{device, c, c.type, tokens, c.channels},
                              {device, c, c.type, tokens, c.channels},
                              {device, c, c.type, tokens, c.states},
                              {device, c, c.type, tokens, c.states},
                              {device, c, c.type, tokens, c.channels},
                              {device, dense, ScalarType::kFloat32, c.channels, c.states},
                              {device, dense, ScalarType::kFloat32, 1, c.channels},
                              {device, dense, ScalarType::kFloat32, c.bias_modalities, c.channels},
                              {device, dense, ScalarType::kFloat32, sequences, size}};
  bool wanted[kOutputs];
  for (int i = 0; i < kOutputs; ++i) wanted[i] = (c.skip_outputs >> i & 1) == 0;
  wanted[kZ] = c.z;
  wanted[kD] = c.D;
  wanted[kBias] = c.bias_modalities > 0;
  Rows* const matrices[5] = {&p.grad_u, &p.grad_dt, &p.grad_B, &p.grad_C, &p.grad_z};
  void** const vectors[4] = {&p.grad_A, &p.grad_D, &p.grad_dt_bias, &p.grad_initial_state};
  for (int i = 0; i < kOutputs; ++i) {
    if (!wanted[i]) continue;
    if (i < kA) *matrices[i] = {outputs[i].data(), outputs[i].stride};
    if (i >= kA) *vectors[i - kA] = outputs[i].data();
  }

  const size_t bytes = workspace_of(p);
  void* workspace = device.allocate(bytes);
  Bytes raw[2][kOutputs];
  for (int run = 0; run < 2; ++run) {
    check(cudaMemset(workspace, run == 0 ? 0xff : 0x7f, bytes), "poison");
    for (Matrix& output : outputs) output.poison();
    check(launch(p, workspace, nullptr), "launch");
    check(cudaDeviceSynchronize(), "synchronize");
    for (int i = 0; i < kOutputs; ++i) raw[run][i] = outputs[i].raw();
  }

  if (c.hostile) return true;

  bool good = true;
  const bool narrow = c.type != ScalarType::kFloat32;
  for (int i = 0; i < kOutputs; ++i) {
    const bool same = raw[0][i] == raw[1][i];
    const bool gaps = outputs[i].gaps_untouched(raw[0][i]);
    double error = 0;
    if (wanted[i]) {
      error = error_of(outputs[i].values(raw[0][i]), problem.expected[i], narrow ? 5e-3 : 1e-5);
      largest[narrow][i] = std::max(largest[narrow][i], error);
    }
    if (same && gaps && error <= 1) continue;
    good = false;
    std::printf("FAILED %s, %s, grad_%s: error %.2f tolerances%s%s\n", c.name.c_str(), path, kNames[i], error,
                same ? "" : ", two runs differ", gaps ? "" : ", wrote between rows");
  }
  return good;
}

bool run_all_paths(const Case& c) {
  const bool good =
      run_case(c, selective_scan_backward_workspace_cuda, launch_selective_scan_backward_cuda, "launcher");
  if (c.type == ScalarType::kFloat32) return good;
  return run_case(c, general_backward_workspace, launch_general_backward, "general path") && good;
}

std::vector<Case> table() {
  std::vector<Case> cases;
  const auto vary = [&](const char* name, auto&& change) {
    for (ScalarType type : {ScalarType::kFloat32, ScalarType::kBFloat16, ScalarType::kFloat16}) {
      Case c;
      c.type = type;
      c.channels = type == ScalarType::kFloat32 ? 70 : 128;
      c.name = std::string(name) + " type " + std::to_string(static_cast<int>(type));
      change(c);
      cases.push_back(c);
    }
  };
  vary("base", [](Case&) {});
  vary("dense", [](Case& c) { c.rows = false, c.modalities = c.bias_modalities = 1; });
  vary("one bias", [](Case& c) { c.bias_modalities = 1; });
  vary("no bias", [](Case& c) { c.bias_modalities = 0; });
  vary("no D", [](Case& c) { c.D = false; });
  vary("no z", [](Case& c) { c.z = false; });
  vary("no states in or out", [](Case& c) { c.initial = c.grad_final = false; });
  vary("padding", [](Case& c) { c.padding = true; });
  vary("reverse", [](Case& c) { c.reverse = true, c.padding = true; });
  vary("no softplus", [](Case& c) { c.softplus = false; });
  vary("packed", [](Case& c) { c.packed = true, c.lengths = {0, 5, 16, 0, 33, 1, 90, 0}; });
  vary("packed reverse", [](Case& c) {
    c.packed = c.reverse = c.padding = true, c.lengths = {3, 0, 48, 17};
  });
  vary("chunks", [](Case& c) { c.lengths = {517, 517}; });
  vary("packed chunks", [](Case& c) { c.packed = c.padding = true, c.lengths = {300, 0, 64, 411, 2}; });
  vary("reverse chunks", [](Case& c) { c.lengths = {700}, c.reverse = true; });
  vary("growing states", [](Case& c) { c.random_rate_sign = true; });
  vary("aligned rows", [](Case& c) { c.gap = 64; });
  vary("odd rows", [](Case& c) { c.gap = 3, c.offset = 1; });
  vary("many channels", [](Case& c) { c.channels = 384, c.lengths = {40, 40, 40}; });
  vary("many modalities", [](Case& c) { c.modalities = c.bias_modalities = 13; });
  vary("many sequences", [](Case& c) { c.lengths = std::vector<int>(300, 9), c.channels = 64; });
  for (int length : {5, 20, 40}) {
    vary("a block a multiprocessor", [&](Case& c) {
      c.channels = 128, c.lengths = std::vector<int>(120, length), c.padding = c.reverse = length == 40;
    });
  }
  for (int states : {0, 1, 3, 17, 64, 300}) {
    vary("states", [&](Case& c) { c.states = states, c.channels = states > 64 ? 9 : 70, c.padding = true; });
  }
  vary("states and chunks", [](Case& c) { c.states = 37, c.lengths = {301, 301}, c.channels = 66; });
  for (int length : {1, 15, 16, 17}) vary("length", [&](Case& c) { c.lengths = {length, length}; });
  for (int i = 0; i < kOutputs; ++i) vary("null output", [&](Case& c) { c.skip_outputs = 1 << i; });
  vary("all outputs null", [](Case& c) { c.skip_outputs = 0xf | 1 << kA | 1 << kInitial; });
  vary("hostile", [](Case& c) { c.packed = c.hostile = true, c.lengths = {40, 0, 300, 7}; });
  vary("no channels", [](Case& c) { c.channels = 0; });
  vary("length 0", [](Case& c) { c.lengths = {0, 0}; });
  vary("batch 0", [](Case& c) { c.lengths = {}; });
  return cases;
}

Case random_case(int index) {
  const auto below = [](int n) { return static_cast<int>(generator() % n); };
  Case c;
  c.name = "random " + std::to_string(index);
  c.type = static_cast<ScalarType>(below(3));
  c.packed = below(2) == 0;
  const int sequences = 1 + below(5), longest = below(4) == 0 ? 400 : 70, length = below(longest);
  c.lengths.assign(sequences, length);
  if (c.packed) {
    for (int& l : c.lengths) l = below(4) == 0 ? 0 : below(longest);
  }
  const int64_t state_choices[] = {1, 2, 5, 8, 15, 33, 48};
  c.states = below(2) == 0 ? 16 : state_choices[below(7)];
  c.channels = below(2) == 0 ? 128 * (1 + below(2)) : 1 + below(150);
  c.rows = below(4) != 0;
  c.modalities = c.rows ? 1 + below(5) : 1;
  c.bias_modalities = below(4) == 0 ? 0 : below(3) == 0 ? 1 : c.modalities;
  c.padding = c.rows && below(2) == 0;
  c.softplus = below(4) != 0;
  c.reverse = below(3) == 0;
  c.D = below(3) != 0;
  c.z = below(3) != 0;
  c.initial = below(2) == 0;
  c.grad_final = below(2) == 0;
  c.gap = below(2) == 0 ? 0 : below(2) == 0 ? 8 * below(9) : below(9);
  c.offset = below(3) == 0 ? below(9) : 0;
  c.skip_outputs = below(3) == 0 ? below(1 << kOutputs) : 0;
  c.random_rate_sign = c.type != ScalarType::kFloat16 && below(6) == 0;  // grows beyond fp16
  return c;
}

int check_all(int table_step, int random_cases, int seed) {
  int failed = 0, cases = 0;
  generator.seed(seed);
  const std::vector<Case> fixed = table();
  for (size_t i = 0; i < fixed.size(); i += table_step) failed += !run_all_paths(fixed[i]), ++cases;
  for (int i = 0; i < random_cases; ++i) failed += !run_all_paths(random_case(i)), ++cases;
  for (int narrow = 0; narrow < 2; ++narrow) {
    std::printf("%s, largest errors in tolerances:", narrow ? "16 bits" : "32 bits");
    for (int i = 0; i < kOutputs; ++i) std::printf(" %s %.2f", kNames[i], largest[narrow][i]);
    std::printf("\n");
  }
  std::printf("%d of %d cases failed\n", failed, cases);
  return failed == 0 ? 0 : 1;
}

__global__ void fill_kernel(void* to, int64_t count, bool wide, float scale, float mean) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    const uint32_t hash = static_cast<uint32_t>((i * 0x9e3779b97f4a7c15ull) >> 32);
    const float x = mean + scale * (hash * 0x1p-31f - 1.0f);
    if (wide) static_cast<float*>(to)[i] = x;
    if (!wide) static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16(x);
  }
}

float median_ms(const SelectiveScanBackwardParams& p, Workspace workspace_of, Launch launch) {
  Device device;
  void* workspace = device.allocate(workspace_of(p));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < 9; ++i) {
    check(cudaEventRecord(begin), "event");
    check(launch(p, workspace, nullptr), "launch");
    check(cudaEventRecord(end), "event");
    check(cudaEventSynchronize(end), "launch");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "event");
    if (i >= 2) times.push_back(ms);
  }
  check(cudaEventDestroy(begin), "event");
  check(cudaEventDestroy(end), "event");
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void bench_shape(ScalarType type, int64_t batch, int64_t length, int64_t channels) {
  constexpr int64_t kStates = 16, kRank = 128, kModalities = 3;
  Device device;
  const int64_t tokens = batch * length, projected = kRank + 2 * kStates;
  const auto fill = [&](int64_t count, bool wide, float scale, float mean) {
    void* p = device.allocate(count * (wide ? 4 : 2));
    fill_kernel<<<1024, 256>>>(p, count, wide, scale, mean);
    check(cudaGetLastError(), "fill");
    return static_cast<char*>(p);
  };
  const auto activations = [&](int64_t columns) {
    return fill(tokens * columns, type == ScalarType::kFloat32, 2, 0);
  };
  const int64_t element = size_of(type);
  SelectiveScanBackwardParams p;
  p.type = type;
  p.channels = channels;
  p.states = kStates;
  p.softplus = true;
  std::vector<std::vector<int>> members(kModalities);
  for (int t = 0; t < tokens; ++t) members[generator() % kModalities].push_back(t);
  std::vector<int32_t> rows(tokens), offsets = {0};
  int32_t row = 0;
  for (const std::vector<int>& times : members) {
    for (int t : times) rows[t] = row++;
    offsets.push_back(row);
  }
  p.order = {device.upload(rows), device.upload(offsets), nullptr, tokens, batch, length, kModalities};
  const char* xz = activations(2 * channels);
  const char* projection = activations(projected);
  p.u = {activations(channels), channels};
  p.dt = {activations(channels), channels};
  p.grad_out = {activations(channels), channels};
  p.z = {xz + channels * element, 2 * channels};
  p.B = {projection + kRank * element, projected};
  p.C = {projection + (kRank + kStates) * element, projected};
  p.A = fill(channels * kStates, true, 8, -8.5f);
  p.D = fill(channels, true, 1, 0);
  p.dt_bias = fill(kModalities * channels, true, 2, -4);
  p.bias_modalities = kModalities;
  p.checkpoints = fill(selective_scan_checkpoint_slots(tokens, batch) * channels * kStates, true, 1, 0);
  char* grad_xz = activations(2 * channels);
  char* grad_projection = activations(projected);
  p.grad_u = {activations(channels), channels};
  p.grad_dt = {activations(channels), channels};
  p.grad_z = {grad_xz + channels * element, 2 * channels};
  p.grad_B = {grad_projection + kRank * element, projected};
  p.grad_C = {grad_projection + (kRank + kStates) * element, projected};
  p.grad_A = device.allocate(channels * kStates * 4);
  p.grad_D = device.allocate(channels * 4);
  p.grad_dt_bias = device.allocate(kModalities * channels * 4);
  std::printf("%s %lldx%lldx%lld, 3 modalities: general %.3f ms",
              type == ScalarType::kFloat32 ? "fp32" : "bf16", static_cast<long long>(batch),
              static_cast<long long>(length), static_cast<long long>(channels),
              median_ms(p, general_backward_workspace, launch_general_backward));
  if (fast_backward_supports(p)) {
    std::printf(", fast %.3f ms, workspace %.0f MB",
                median_ms(p, fast_backward_workspace, launch_fast_backward),
                fast_backward_workspace(p) * 1e-6);
  }
  std::printf(", general workspace %.0f MB\n", general_backward_workspace(p) * 1e-6);
}

int bench() {
  bench_shape(ScalarType::kBFloat16, 4, 4096, 4096);
  bench_shape(ScalarType::kBFloat16, 8, 2048, 4096);
  bench_shape(ScalarType::kBFloat16, 1, 16384, 4096);
  bench_shape(ScalarType::kBFloat16, 16, 4096, 1536);
  bench_shape(ScalarType::kBFloat16, 1, 4096, 4096);
  bench_shape(ScalarType::kFloat32, 4, 1024, 1024);
  bench_shape(ScalarType::kFloat32, 4, 4096, 4096);
  return 0;
}

}  // namespace
}  // namespace mixture_of_mamba

int main(int argc, char** argv) {
  using namespace mixture_of_mamba;
  const std::string mode = argc > 1 ? argv[1] : "200";
  if (mode == "bench") return bench();
  if (mode == "few") return check_all(7, 0, 1);
  return check_all(1, std::atoi(mode.c_str()), argc > 2 ? std::atoi(argv[2]) : 1);
}

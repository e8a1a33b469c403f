// SPDX-License-Identifier: Apache-2.0
#include "cuda_device.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "device.h"
#include "kernels/cuda/selective_scan_bwd.h"

namespace mixture_of_mamba::testing {

namespace {

int64_t guard_bytes() {
  static const int64_t bytes = [] {
    const char* value = std::getenv("MOM_TEST_GUARD");
    return value != nullptr ? std::atoll(value) : 1280ll;
  }();
  return bytes;
}

__global__ void probe_kernel() {}

}  // namespace

void check_cuda(int status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(status)));
}

const char* reason_to_skip() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return "there is no GPU that CUDA can use";
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, probe_kernel) == cudaErrorNoKernelImageForDevice) {
    return "the executable has no code for this GPU";
  }
  return nullptr;
}

CudaArena::~CudaArena() {
  for (const Allocation& allocation : allocations_) cudaFree(allocation.begin);
}

void* CudaArena::allocate(int64_t bytes) {
  const int64_t size = std::max<int64_t>(1, bytes + 2 * guard_bytes());
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, size), "cudaMalloc");
  check_cuda(cudaMemset(memory, kPoison, size), "cudaMemset");
  allocations_.push_back({static_cast<unsigned char*>(memory), bytes});
  return allocations_.back().begin + guard_bytes();
}

void CudaArena::write(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "writing to the GPU");
}

void CudaArena::read(void* to, const void* from, int64_t bytes) const {
  if (bytes > 0) check_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "reading from the GPU");
}

bool CudaArena::intact() const {
  Bytes guard(guard_bytes());
  const auto is_poison = [&](const unsigned char* from) {
    read(guard.data(), from, guard_bytes());
    return std::all_of(guard.begin(), guard.end(), [](unsigned char byte) { return byte == kPoison; });
  };
  return std::all_of(allocations_.begin(), allocations_.end(), [&](const Allocation& allocation) {
    return is_poison(allocation.begin) && is_poison(allocation.begin + guard_bytes() + allocation.bytes);
  });
}

void run_with_workspace(size_t bytes, unsigned char poison, const std::function<int(void*)>& launch) {
  CudaArena arena;
  void* const workspace = arena.allocate(static_cast<int64_t>(bytes));
  check_cuda(cudaMemset(workspace, poison, bytes), "cudaMemset");
  check_cuda(launch(workspace), "launch");
  check_cuda(cudaDeviceSynchronize(), "kernel");
  if (!arena.intact()) throw std::runtime_error("a kernel wrote beside its workspace");
}

namespace {

template <typename Params>
std::function<void(const Params&)> runner(size_t (*workspace)(const Params&),
                                          int (*launch)(const Params&, void*, CUstream_st*),
                                          unsigned char poison) {
  return [=](const Params& params) {
    run_with_workspace(workspace(params), poison,
                       [&](void* memory) { return launch(params, memory, nullptr); });
  };
}

}  // namespace

const Device& device() {
  static const Device gpu = [] {
    Device device;
    // An exponential on the FMA pipe has a decay rate within 1e-5; with 16-bit types the special-function
    // unit's approximations are used throughout and states rest as bfloat16 between two sweeps.
    device.float32 = {2e-5L, 5e-4L};
    device.half = {3e-3L, 0.1L};
    device.new_arena = [] { return std::make_unique<CudaArena>(); };
    for (unsigned char poison : kWorkspacePoisons) {
      const auto forward =
          runner(selective_scan_forward_workspace_cuda, launch_selective_scan_forward_cuda, poison);
      device.scan.push_back(
          {"chosen path", forward,
           runner(selective_scan_backward_workspace_cuda, launch_selective_scan_backward_cuda, poison)});
      device.scan.push_back(
          {"general path", forward, runner(general_backward_workspace, launch_general_backward, poison)});
      device.conv.push_back(
          {"cuda", runner(causal_conv1d_forward_workspace_cuda, launch_causal_conv1d_forward_cuda, poison),
           runner(causal_conv1d_backward_workspace_cuda, launch_causal_conv1d_backward_cuda, poison)});
      device.modality_routing.push_back(
          runner(modality_routing_workspace_cuda, launch_modality_routing_cuda, poison));
    }
    device.permute_rows.push_back([](const PermuteRowsParams& params) {
      run_with_workspace(0, kPoison, [&](void*) { return launch_permute_rows_cuda(params, nullptr); });
    });
    device.conversions.push_back([](const ConversionsParams& params) {
      run_with_workspace(0, kPoison, [&](void*) { return launch_conversions_cuda(params, nullptr); });
    });
    return device;
  }();
  return gpu;
}

}  // namespace mixture_of_mamba::testing

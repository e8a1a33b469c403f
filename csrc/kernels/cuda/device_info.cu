// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/device_info.h"

#include <cuda_runtime.h>

#include <atomic>

namespace mixture_of_mamba {

namespace {

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : 0;
}

__global__ void probe_kernel() {}

}  // namespace

int compiled_capability_cuda() {
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMostDevices) return 0;
  if (known[device] == 0) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, probe_kernel) != cudaSuccess) return 0;
    known[device] = attributes.ptxVersion;
  }
  return known[device];
}

int compute_capability_cuda() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

int multiprocessors_cuda() { return attribute(cudaDevAttrMultiProcessorCount); }

bool chained_launches_cuda() {
  constexpr int kCapturesThem = 12030;  // CUDA 12.3
  static const int driver = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  }();
  return driver >= kCapturesThem && compiled_capability_cuda() >= 90;
}

}  // namespace mixture_of_mamba

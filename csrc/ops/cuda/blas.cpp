// SPDX-License-Identifier: Apache-2.0
#include "ops/cuda/blas.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>

namespace mixture_of_mamba::ops {

namespace {

// cublas_api.h and library_types.h: these are part of cuBLAS' interface since CUDA 11, and are declared here
// so that building needs no more of the toolkit than its compiler.
constexpr int kNotTransposed = 0, kTransposed = 1;
constexpr int kFloat16 = 2, kBFloat16 = 14;
constexpr int kComputeFloat32 = 68;
constexpr int kDefaultAlgorithm = -1;
constexpr int kNoReducedPrecisionReduction = 16;
using Handle = void*;
using GemmEx = int (*)(Handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
                       const void* a, int a_type, int lda, const void* b, int b_type, int ldb,
                       const void* beta, void* c, int c_type, int ldc, int compute_type, int algorithm);
using SetMathMode = int (*)(Handle, int);

struct Cublas {
  GemmEx gemm = nullptr;
  SetMathMode set_math_mode = nullptr;

  // The one that torch is linked with: a handle belongs to its library.
  Cublas() {
    void* const torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) return;
    gemm = reinterpret_cast<GemmEx>(dlsym(torch, "cublasGemmEx"));
    set_math_mode = reinterpret_cast<SetMathMode>(dlsym(torch, "cublasSetMathMode"));
    dlclose(torch);
  }
  explicit operator bool() const { return gemm != nullptr && set_math_mode != nullptr; }
};

const Cublas& cublas() {
  static const Cublas loaded;
  return loaded;
}

bool fits(const Factor& f) {
  constexpr int64_t kLargest = INT32_MAX;
  return f.memory != nullptr && f.rows > 0 && f.columns > 0 &&
         std::max({f.rows, f.columns, f.stride}) <= kLargest;
}

void check(int status, const char* call) {
  if (status != 0) {
    throw std::runtime_error("mixture_of_mamba: " + std::string(call) + " failed with status " +
                             std::to_string(status));
  }
}

}  // namespace

bool multiply_by_cublas(const Factor& left, const Factor& right, const Factor& out, bool add) {
  const int type = out.dtype == Dtype::BFloat16 ? kBFloat16 : out.dtype == Dtype::Half ? kFloat16 : -1;
  if (type < 0 || out.transposed || left.dtype != out.dtype || right.dtype != out.dtype || !fits(left) ||
      !fits(right) || !fits(out) || !cublas()) {
    return false;
  }
  const torch::stable::accelerator::DeviceGuard guard(out.device);
  Handle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  // cuBLAS counts in columns: the transpose of everything, so that the factors change places.
  const float alpha = 1.0f, beta = add ? 1.0f : 0.0f;
  const auto operation = [](const Factor& f) { return f.transposed ? kTransposed : kNotTransposed; };
  const auto integer = [](int64_t size) { return static_cast<int>(size); };
  check(cublas().set_math_mode(handle, kNoReducedPrecisionReduction), "cublasSetMathMode");
  check(cublas().gemm(handle, operation(right), operation(left), integer(out.columns), integer(out.rows),
                      integer(left.columns), &alpha, right.memory, type, integer(right.stride), left.memory,
                      type, integer(left.stride), &beta, out.memory, type, integer(out.stride),
                      kComputeFloat32, kDefaultAlgorithm),
        "cublasGemmEx");
  return true;
}

}  // namespace mixture_of_mamba::ops

// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "arena.h"

// Device memory and launches, for tests that only a GPU runs.
//
//   MOM_TEST_GUARD   bytes on both sides of each allocation that must stay as they are (1280). With 0 an
//                    allocation is exactly what a kernel may touch, as compute-sanitizer wants it.

namespace mixture_of_mamba::testing {

// Throws, with the error's name, unless `status` is cudaSuccess.
void check_cuda(int status, const char* what);

class CudaArena : public Arena {
 public:
  CudaArena() = default;
  CudaArena(const CudaArena&) = delete;
  CudaArena& operator=(const CudaArena&) = delete;
  ~CudaArena() override;
  // Aligned to 256 bytes and no more.
  void* allocate(int64_t bytes) override;
  void write(void* to, const void* from, int64_t bytes) override;
  void read(void* to, const void* from, int64_t bytes) const override;
  bool intact() const override;

 private:
  struct Allocation {
    unsigned char* begin;  // of the guard before it
    int64_t bytes;         // between the guards
  };
  std::vector<Allocation> allocations_;
};

// Calls launch(workspace) with exactly `bytes` of workspace, every one of them `poison`, and waits. Throws
// when it fails, or when something beside the workspace was written.
void run_with_workspace(size_t bytes, unsigned char poison, const std::function<int(void*)>& launch);

// What workspaces hold: results must not depend on it. As floats NaN and 3e38, as integers -1 and 2e9.
constexpr unsigned char kWorkspacePoisons[] = {0xff, 0x7f};

}  // namespace mixture_of_mamba::testing

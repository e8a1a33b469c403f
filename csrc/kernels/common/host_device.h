// SPDX-License-Identifier: Apache-2.0
#pragma once

// Marks a function that both the CPU compilers and nvcc's device pass may call. Always inlined on the CPU: a
// copy left over by a file compiled for AVX-512 must never serve the others.
#ifdef __CUDACC__
#define MOM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOM_HOST_DEVICE inline __attribute__((always_inline))
#endif

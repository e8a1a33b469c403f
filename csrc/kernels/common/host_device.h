// SPDX-License-Identifier: Apache-2.0
#pragma once

// Marks a function that both the CPU compilers and nvcc's device pass may call.
#ifdef __CUDACC__
#define MOM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOM_HOST_DEVICE inline
#endif

// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the libraries tell about themselves, in plain C so that it can be asked without torch
// (mixture_of_mamba/doctor.py does).

#define MOM_EXPORT extern "C" __attribute__((visibility("default")))

// Torch that the library was built against, such as "2.13.0".
MOM_EXPORT const char* mixture_of_mamba_built_with_torch();
// Instruction set of the CPU kernels that this machine runs: "baseline", "avx2" or "avx512".
MOM_EXPORT const char* mixture_of_mamba_cpu_isa();
// In the CUDA library: toolkit, such as "13.0", and architectures in CMake's notation, such as "90-real 120".
MOM_EXPORT const char* mixture_of_mamba_cuda_toolkit();
MOM_EXPORT const char* mixture_of_mamba_cuda_architectures();

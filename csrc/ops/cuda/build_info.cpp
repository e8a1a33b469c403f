// SPDX-License-Identifier: Apache-2.0
#include "ops/build_info.h"

const char* mixture_of_mamba_cuda_toolkit() { return MOM_CUDA_TOOLKIT; }
const char* mixture_of_mamba_cuda_architectures() { return MOM_CUDA_ARCHITECTURES; }

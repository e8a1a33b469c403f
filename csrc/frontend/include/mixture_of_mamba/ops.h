// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mixture_of_mamba/ops/causal_conv1d.h>
#include <mixture_of_mamba/ops/grouped_linear.h>
#include <mixture_of_mamba/ops/mamba_block.h>
#include <mixture_of_mamba/ops/modality_routing.h>
#include <mixture_of_mamba/ops/selective_scan.h>

#include <string>

/// \file
/// The operators as C++ functions that record gradients. Every function goes through torch's dispatcher, so
/// autocast, profilers and torch::NoGradGuard work as for torch's own. Errors are c10::Error
/// (what_without_backtrace() is the text) and name the argument, what was required, and what came.
///
/// Words: `rows` int32 [batch * length], time -> row; `offsets` int32 [modalities + 1], modality m owns rows
/// offsets[m] .. offsets[m + 1], rows beyond the last are padding; `host_offsets` the same as int64 on the
/// CPU; `cu_seqlens` int32 [sequences + 1], boundaries of packed sequences in flat time order. Sequences are
/// the rows of the batch where there is no cu_seqlens. See Routing, which makes the first three.
///
/// Parameters, states and all arithmetic of the scan are float32 (float64 beside float64 activations, CPU
/// only).

namespace mixture_of_mamba {

/// Registers the operators' autograd, meta and autocast kernels of C++, once per process. All functions and
/// modules here call it; call it yourself before using the operators through torch's dispatcher alone.
///
/// Where the Python package has been imported its registrations stand, and these keep out.
/// \return whether the registrations of C++ are this process's.
bool initialize();

/// Instruction set of the CPU kernels that this machine runs: "baseline", "avx2" or "avx512".
std::string cpu_isa();

}  // namespace mixture_of_mamba

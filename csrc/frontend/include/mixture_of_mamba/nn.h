// SPDX-License-Identifier: Apache-2.0
#pragma once

/// \file
/// All of the C++ frontend: operators, routing, layers.

#include <mixture_of_mamba/nn/mamba.h>
#include <mixture_of_mamba/nn/mixture_of_mamba.h>
#include <mixture_of_mamba/nn/modality_linear.h>
#include <mixture_of_mamba/nn/rms_norm.h>
#include <mixture_of_mamba/nn/state.h>
#include <mixture_of_mamba/ops.h>
#include <mixture_of_mamba/routing.h>

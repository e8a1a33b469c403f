// SPDX-License-Identifier: Apache-2.0
#pragma once

/// \file
/// Models on the layers.

#include <mixture_of_mamba/models/chameleon.h>
#include <mixture_of_mamba/models/decoder.h>
#include <mixture_of_mamba/models/losses.h>
#include <mixture_of_mamba/models/vocabulary.h>

// SPDX-License-Identifier: Apache-2.0
#pragma once

// All of the vector code.

#include "kernels/cpu/vector_io.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/cpu/vector_sums.h"

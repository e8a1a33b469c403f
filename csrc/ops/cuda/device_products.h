// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/products.h"

namespace mixture_of_mamba::ops {

const DeviceProducts& device_products();

}  // namespace mixture_of_mamba::ops

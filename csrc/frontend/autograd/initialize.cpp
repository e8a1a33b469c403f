// SPDX-License-Identifier: Apache-2.0
#include "mixture_of_mamba/ops.h"
#include "registration.h"

// In libmixture_of_mamba.so. A reference to it makes the linker keep the library, whose operators nothing
// else names.
extern "C" const char* mixture_of_mamba_cpu_isa();

namespace mixture_of_mamba {

namespace {

bool register_unless_registered() {
  (void)mixture_of_mamba_cpu_isa();
  const auto scan = c10::Dispatcher::singleton().findSchemaOrThrow("mixture_of_mamba::selective_scan", "");
  if (scan.hasKernelForDispatchKey(c10::DispatchKey::Autograd)) return false;
  // Never destroyed: registrations last as long as the process, and static objects end in no known order.
  auto* library =
      new torch::Library(torch::Library::IMPL, "mixture_of_mamba", std::nullopt, __FILE__, __LINE__);
  frontend::register_modality_routing(*library);
  frontend::register_grouped_linear(*library);
  frontend::register_causal_conv1d(*library);
  frontend::register_selective_scan(*library);
  frontend::register_mamba_block(*library);
  return true;
}

}  // namespace

bool initialize() {
  static const bool registered = register_unless_registered();
  return registered;
}

std::string cpu_isa() { return mixture_of_mamba_cpu_isa(); }

}  // namespace mixture_of_mamba

# SPDX-License-Identifier: Apache-2.0
# find_package(MixtureOfMamba COMPONENTS ops nn)
#
#   MixtureOfMamba::ops  the operator libraries: their operators are on torch's dispatcher, for example for a program
#                        that runs what was exported from Python
#   MixtureOfMamba::nn   functions that record gradients, torch::nn modules, models; compiled here, for your torch
#
# Torch (any LibTorch >= 2.11, also the one of Python's torch package) is found by the way.
include(CMakeFindDependencyMacro)
get_filename_component(mixture_of_mamba_lib "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)

# Python's torch lies beside Python's mixture_of_mamba.
find_dependency(Torch HINTS "${mixture_of_mamba_lib}/../../torch/share/cmake")
if(Torch_VERSION AND Torch_VERSION VERSION_LESS 2.11)
  set(MixtureOfMamba_FOUND FALSE)
  set(MixtureOfMamba_NOT_FOUND_MESSAGE "torch >= 2.11 is needed, and ${Torch_DIR} is torch ${Torch_VERSION}")
  return()
endif()

if(NOT TARGET MixtureOfMamba::ops)
  add_library(MixtureOfMamba::ops INTERFACE IMPORTED)
  set(mixture_of_mamba_names mixture_of_mamba)
  if(EXISTS "${mixture_of_mamba_lib}/libmixture_of_mamba_cuda.so" AND
      EXISTS "${TORCH_INSTALL_PREFIX}/lib/libtorch_cuda.so")
    list(APPEND mixture_of_mamba_names mixture_of_mamba_cuda)
  endif()
  foreach(name IN LISTS mixture_of_mamba_names)
    # Operators register themselves when their library is loaded; no symbol of it is named in a program.
    target_link_options(MixtureOfMamba::ops INTERFACE
      "LINKER:--push-state,--no-as-needed,${mixture_of_mamba_lib}/lib${name}.so,--pop-state")
  endforeach()
  # What the libraries need of torch is found when they are loaded.
  target_link_options(MixtureOfMamba::ops INTERFACE LINKER:--allow-shlib-undefined "LINKER:-rpath,${mixture_of_mamba_lib}")
  target_link_libraries(MixtureOfMamba::ops INTERFACE ${TORCH_LIBRARIES})
endif()
set(MixtureOfMamba_ops_FOUND TRUE)

if("nn" IN_LIST MixtureOfMamba_FIND_COMPONENTS)
  if(NOT TARGET MixtureOfMamba::nn)
    include("${CMAKE_CURRENT_LIST_DIR}/MixtureOfMambaFrontend.cmake")
    mixture_of_mamba_add_frontend(mixture_of_mamba_nn
      SOURCES "${mixture_of_mamba_lib}/mixture_of_mamba/frontend"
      HEADERS "${mixture_of_mamba_lib}/mixture_of_mamba/frontend/include"
      LIBRARIES MixtureOfMamba::ops)
    set_target_properties(mixture_of_mamba_nn PROPERTIES EXCLUDE_FROM_ALL ON)
    add_library(MixtureOfMamba::nn ALIAS mixture_of_mamba_nn)
  endif()
  set(MixtureOfMamba_nn_FOUND TRUE)
endif()

foreach(component IN LISTS MixtureOfMamba_FIND_COMPONENTS)
  if(NOT MixtureOfMamba_${component}_FOUND AND MixtureOfMamba_FIND_REQUIRED_${component})
    set(MixtureOfMamba_FOUND FALSE)
    set(MixtureOfMamba_NOT_FOUND_MESSAGE "components are ops and nn, got ${component}")
  endif()
endforeach()

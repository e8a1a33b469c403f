# SPDX-License-Identifier: Apache-2.0
# Decides MOM_WITH_CUDA and sets up nvcc. torch.cuda.is_available() is never asked: build machines
# have no GPU.

if(NOT MOM_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MOM_CUDA must be AUTO, ON or OFF, got ${MOM_CUDA}")
endif()

set(MOM_WITH_CUDA OFF)
find_program(MOM_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin PATHS /usr/local/cuda/bin)
if(MOM_CUDA STREQUAL "ON" AND NOT MOM_NVCC)
  message(FATAL_ERROR "MOM_CUDA=ON needs nvcc, which was not found: install the CUDA toolkit or set CUDA_HOME")
elseif(MOM_CUDA STREQUAL "ON" OR (MOM_CUDA STREQUAL "AUTO" AND MOM_NVCC AND MOM_TORCH_CUDA))
  set(MOM_WITH_CUDA ON)
elseif(MOM_CUDA STREQUAL "AUTO" AND MOM_NVCC)
  message(STATUS "mixture_of_mamba: CPU only, since torch is built without CUDA (MOM_CUDA=ON builds CUDA anyway)")
elseif(MOM_CUDA STREQUAL "AUTO")
  message(STATUS "mixture_of_mamba: CPU only, since nvcc was not found (install the CUDA toolkit for GPU kernels)")
endif()

if(MOM_WITH_CUDA)
  # TORCH_CUDA_ARCH_LIST in torch's own notation: "8.0;9.0 12.0+PTX". Otherwise this machine's GPUs; and where there
  # are none, code that newer GPUs can run too.
  set(architectures "$ENV{TORCH_CUDA_ARCH_LIST}")
  if(NOT architectures)
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" architectures "${found}")
    list(REMOVE_DUPLICATES architectures)
    list(SORT architectures COMPARE NATURAL)
  endif()
  if(NOT architectures)
    set(architectures "9.0+PTX")
  endif()
  string(REGEX REPLACE "[ ,]+" ";" architectures "${architectures}")
  set(CMAKE_CUDA_ARCHITECTURES "")
  foreach(architecture IN LISTS architectures)
    string(REGEX MATCH "^([0-9]+)\\.([0-9]+a?)(\\+PTX)?$" matched "${architecture}")
    if(NOT matched)
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must hold entries such as 9.0 or 12.0+PTX, got ${architecture}")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    if(CMAKE_MATCH_3)
      list(APPEND CMAKE_CUDA_ARCHITECTURES "${number}")
    else()
      list(APPEND CMAKE_CUDA_ARCHITECTURES "${number}-real")
    endif()
  endforeach()
  set(CMAKE_CUDA_COMPILER ${MOM_NVCC})
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.5)
    message(FATAL_ERROR "nvcc must be of CUDA 12.5 or newer, got ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  # CMake 3.25 does not know yet that CUDA 12 and later have C++20.
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()

  # The stream functions live in libtorch_cuda.so, which torch loads privately: the CUDA library must
  # name it itself. A torch without CUDA has no such file, so an empty library with its name stands in
  # while linking.
  if(EXISTS ${MOM_TORCH_LIB}/libtorch_cuda.so)
    set(torch_cuda ${MOM_TORCH_LIB}/libtorch_cuda.so)
  else()
    set(torch_cuda ${CMAKE_CURRENT_BINARY_DIR}/stub/libtorch_cuda.so)
    file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/stub/empty.c "")
    execute_process(
      COMMAND ${CMAKE_CXX_COMPILER} -x c -shared -fPIC -Wl,-soname,libtorch_cuda.so
        ${CMAKE_CURRENT_BINARY_DIR}/stub/empty.c -o ${torch_cuda}
      COMMAND_ERROR_IS_FATAL ANY)
  endif()
  add_library(mom_torch_cuda INTERFACE)
  target_link_options(mom_torch_cuda INTERFACE LINKER:--no-as-needed,${torch_cuda},--as-needed)
endif()

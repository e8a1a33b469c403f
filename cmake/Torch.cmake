# SPDX-License-Identifier: Apache-2.0
# mom_torch: headers and libraries of the target environment's torch, for code on the stable ABI.
#
# find_package(Torch) is not used: with a CUDA torch and no nvcc it is a fatal error, and it overrides
# the architectures. MOM_TORCH_ROOT is the installed `torch` folder, or an unpacked LibTorch, which needs no Python;
# without it python3 is asked.

set(MOM_TORCH_ROOT "" CACHE PATH "The installed torch folder (by default that of MOM_PYTHON)")
set(MOM_PYTHON python3 CACHE STRING "The Python whose torch is built against")
if(NOT MOM_TORCH_ROOT)
  execute_process(
    COMMAND ${MOM_PYTHON} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "torch >= 2.11 is needed to build and ${MOM_PYTHON} has none: pip install torch, or set "
      "MOM_TORCH_ROOT to an unpacked LibTorch")
  endif()
  set(MOM_TORCH_ROOT ${root} CACHE PATH "" FORCE)
endif()
set(MOM_TORCH_LIB ${MOM_TORCH_ROOT}/lib)
if(EXISTS ${MOM_TORCH_ROOT}/version.py)
  file(STRINGS ${MOM_TORCH_ROOT}/version.py version_lines REGEX "^(__version__|cuda)")
  string(REGEX MATCH "cuda[^=]*= *'([0-9.]+)'" unused "${version_lines}")
  set(MOM_TORCH_CUDA "${CMAKE_MATCH_1}")
  string(REGEX MATCH "__version__[^=]*= *'([^']+)'" unused "${version_lines}")
  set(MOM_TORCH_VERSION "${CMAKE_MATCH_1}")
elseif(EXISTS ${MOM_TORCH_ROOT}/build-version)
  file(STRINGS ${MOM_TORCH_ROOT}/build-version MOM_TORCH_VERSION LIMIT_COUNT 1)
  string(REGEX MATCH "\\+cu([0-9]+)([0-9])" unused "${MOM_TORCH_VERSION}")
  set(MOM_TORCH_CUDA "")
  if(unused)
    set(MOM_TORCH_CUDA "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  endif()
else()
  message(FATAL_ERROR "MOM_TORCH_ROOT must be an installed torch folder or an unpacked LibTorch, but "
    "${MOM_TORCH_ROOT} has neither version.py nor build-version")
endif()
if(MOM_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR
    "torch >= 2.11 is needed, and ${MOM_TORCH_ROOT} is torch ${MOM_TORCH_VERSION}: pip install --upgrade torch")
endif()

add_library(mom_torch INTERFACE)
target_include_directories(mom_torch SYSTEM INTERFACE ${MOM_TORCH_ROOT}/include)
# One byte each of major, minor, patch: the oldest torch that the binaries run on is 2.11.
target_compile_definitions(mom_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_libraries(mom_torch INTERFACE
  ${MOM_TORCH_LIB}/libtorch.so ${MOM_TORCH_LIB}/libtorch_cpu.so ${MOM_TORCH_LIB}/libc10.so)
# Shared libraries may leave symbols to the loader; torch's own dependencies are not ours to resolve.
target_link_options(mom_torch INTERFACE LINKER:--allow-shlib-undefined)

# mom_torch_full: the same torch for code on its whole C++ API, as the frontend is.
add_library(mom_torch_full INTERFACE)
target_include_directories(mom_torch_full SYSTEM INTERFACE
  ${MOM_TORCH_ROOT}/include ${MOM_TORCH_ROOT}/include/torch/csrc/api/include)
target_link_libraries(mom_torch_full INTERFACE
  ${MOM_TORCH_LIB}/libtorch.so ${MOM_TORCH_LIB}/libtorch_cpu.so ${MOM_TORCH_LIB}/libc10.so)
target_link_options(mom_torch_full INTERFACE LINKER:--allow-shlib-undefined)

# SPDX-License-Identifier: Apache-2.0
find_program(MOM_CCACHE ccache)
if(MOM_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${MOM_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${MOM_CCACHE})
endif()

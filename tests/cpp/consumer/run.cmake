# SPDX-License-Identifier: Apache-2.0
# cmake -DBUILD= -DWORK= -DTORCH= -DCOMPILER= -DLAUNCHER= -DGENERATOR= -DMAKE_PROGRAM= -P run.cmake
#
# What a user does: installs the build tree into a prefix, configures this project in a clean folder with nothing but
# find_package, builds it and runs the program. Its text is that of docs/cpp.md.

file(READ ${CMAKE_CURRENT_LIST_DIR}/main.cpp program)
string(REPLACE "// SPDX-License-Identifier: Apache-2.0\n" "" program "${program}")
file(READ ${CMAKE_CURRENT_LIST_DIR}/../../../docs/cpp.md page)
string(FIND "${page}" "```cpp\n${program}```" found)
if(found EQUAL -1)
  message(FATAL_ERROR "docs/cpp.md must show the program of tests/cpp/consumer/main.cpp as it is")
endif()

file(REMOVE_RECURSE ${WORK})
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY WORKING_DIRECTORY ${WORK})
endfunction()
file(MAKE_DIRECTORY ${WORK}/source)
file(COPY ${CMAKE_CURRENT_LIST_DIR}/CMakeLists.txt ${CMAKE_CURRENT_LIST_DIR}/main.cpp DESTINATION ${WORK}/source)
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
run(${CMAKE_COMMAND} -S source -B build -G ${GENERATOR} -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM}
  -DCMAKE_PREFIX_PATH=${WORK}/prefix -DTorch_DIR=${TORCH}/share/cmake/Torch
  -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_CXX_COMPILER_LAUNCHER=${LAUNCHER})
run(${CMAKE_COMMAND} --build build --parallel 2)
run(${WORK}/build/first_steps)

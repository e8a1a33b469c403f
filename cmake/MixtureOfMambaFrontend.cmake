# SPDX-License-Identifier: Apache-2.0
# The C++ frontend, compiled for one torch: used by this project's own build and by MixtureOfMambaConfig.cmake.
#
# mixture_of_mamba_add_frontend(<target> SOURCES <folder> HEADERS <folder> LIBRARIES <torch and operator libraries>)
function(mixture_of_mamba_add_frontend target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "SOURCES;HEADERS" "LIBRARIES")
  # Reading torch's headers takes most of the time, so files are compiled together: one unit of operators, one of layers.
  # That is less work than a precompiled header (700 MB), and ccache keeps it.
  file(GLOB operators CONFIGURE_DEPENDS ${arg_SOURCES}/autograd/*.cpp)
  file(GLOB layers CONFIGURE_DEPENDS ${arg_SOURCES}/nn/*.cpp ${arg_SOURCES}/models/*.cpp ${arg_SOURCES}/*.cpp)
  set_source_files_properties(${operators} PROPERTIES UNITY_GROUP operators)
  set_source_files_properties(${layers} PROPERTIES UNITY_GROUP layers)
  add_library(${target} STATIC ${operators} ${layers})
  set_target_properties(${target} PROPERTIES
    UNITY_BUILD ON UNITY_BUILD_MODE GROUP
    POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_include_directories(${target} PUBLIC ${arg_HEADERS} PRIVATE ${arg_SOURCES})
  # fmt comes with torch's headers. Nothing of it appears in ours.
  target_compile_definitions(${target} PRIVATE FMT_HEADER_ONLY)
  target_link_libraries(${target} PUBLIC ${arg_LIBRARIES})
endfunction()

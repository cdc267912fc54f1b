# How all of our own targets are compiled. Linked privately: consumers see none of it.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# Binaries find the library beside them, so that a build folder can be copied to another machine.
set(CMAKE_BUILD_RPATH_USE_ORIGIN ON)
# What is loaded at run time: from bin/ and tests/*/ of a build folder, from bin/ of what
# `./dev gpu-package` makes.
set(CMAKE_BUILD_RPATH "$ORIGIN/../src;$ORIGIN/../../src;$ORIGIN/../lib")

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE RelWithDebInfo)
endif()
# Optimised enough to finish in time on two cores; line tables are all that reports need.
set(CMAKE_CXX_FLAGS_SANITIZE "-O1 -g1 -fno-omit-frame-pointer")

find_program(CCACHE ccache)
if(CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()

include(CheckCXXCompilerFlag)
add_library(deep_ep_options INTERFACE)
# No contraction: fma happens where plan/numerics.hpp says so and nowhere else.
target_compile_options(deep_ep_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wno-missing-field-initializers -Wno-restrict -ffp-contract=off>
  $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false --Wext-lambda-captures-this -Xcompiler=-Wall>)
# Structs of some 100 bytes, of which a call fills and copies dozens, by plain moves: g++ would take
# `rep stos` and `rep movs`, of which each takes longer to begin than all of those moves.
set(deep_ep_strategy unrolled_loop:256:noalign,libcall:-1:noalign)
check_cxx_compiler_flag("-mmemcpy-strategy=${deep_ep_strategy}" DEEP_EP_HAS_MEMCPY_STRATEGY)
if(DEEP_EP_HAS_MEMCPY_STRATEGY)
  target_compile_options(deep_ep_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-mmemcpy-strategy=${deep_ep_strategy} -mmemset-strategy=${deep_ep_strategy}>)
endif()
if(DEEP_EP_WERROR)
  target_compile_options(deep_ep_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Werror> $<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings>)
endif()
if(DEEP_EP_SANITIZE)
  target_compile_options(deep_ep_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${DEEP_EP_SANITIZE} -fno-sanitize-recover=all>)
  target_link_options(deep_ep_options INTERFACE -fsanitize=${DEEP_EP_SANITIZE})
endif()

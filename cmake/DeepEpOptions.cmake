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

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE RelWithDebInfo)
endif()
find_program(CCACHE ccache)
if(CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE})
endif()

add_library(deep_ep_options INTERFACE)
# No contraction: fma happens where plan/numerics.hpp says so and nowhere else.
target_compile_options(deep_ep_options INTERFACE -Wall -Wextra -Wshadow -Wno-missing-field-initializers -ffp-contract=off)
if(DEEP_EP_SANITIZE)
  target_compile_options(deep_ep_options INTERFACE -fsanitize=${DEEP_EP_SANITIZE} -fno-omit-frame-pointer -g)
  target_link_options(deep_ep_options INTERFACE -fsanitize=${DEEP_EP_SANITIZE})
  if(DEEP_EP_SANITIZE MATCHES undefined)
    target_compile_options(deep_ep_options INTERFACE -fno-sanitize-recover=undefined)
  endif()
endif()

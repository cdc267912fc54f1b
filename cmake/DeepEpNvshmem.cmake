# Turns nodes of GPUs on when NVSHMEM is found: in NVSHMEM_HOME, or as pip installs it. Its wheel
# has no CMake files and no unversioned library names. Sets DEEP_EP_NVSHMEM_ON and the target
# deep_ep_nvshmem_library.
set(DEEP_EP_NVSHMEM_ON OFF)

if(NOT DEEP_EP_NVSHMEM MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "DEEP_EP_NVSHMEM is '${DEEP_EP_NVSHMEM}'; it must be AUTO, ON or OFF")
endif()

# Folders named nvidia/nvshmem of Python's packages, of the Python that is called python3 and of .venv.
function(deep_ep_nvshmem_wheels folders_variable)
  file(GLOB folders ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/nvshmem)
  find_program(DEEP_EP_PYTHON3 python3)
  if(DEEP_EP_PYTHON3)
    execute_process(
      COMMAND ${DEEP_EP_PYTHON3} -c "import importlib.util as u; s = u.find_spec('nvidia.nvshmem'); print(';'.join(s.submodule_search_locations) if s else '', end='')"
      OUTPUT_VARIABLE found ERROR_QUIET)
    list(APPEND folders ${found})
  endif()
  set(${folders_variable} ${folders} PARENT_SCOPE)
endfunction()

set(reason "")
if(DEEP_EP_NVSHMEM STREQUAL "OFF")
  set(reason "DEEP_EP_NVSHMEM=OFF")
elseif(NOT DEEP_EP_CUDA_ON)
  set(reason "CUDA is off")
else()
  deep_ep_nvshmem_wheels(wheels)
  set(hints $ENV{NVSHMEM_HOME} ${wheels})
  find_path(DEEP_EP_NVSHMEM_INCLUDE nvshmem.h HINTS ${hints} PATH_SUFFIXES include)
  find_file(DEEP_EP_NVSHMEM_DEVICE libnvshmem_device.a HINTS ${hints} PATH_SUFFIXES lib)
  find_file(DEEP_EP_NVSHMEM_HOST NAMES libnvshmem_host.so libnvshmem_host.so.3 HINTS ${hints} PATH_SUFFIXES lib)
  if(NOT DEEP_EP_NVSHMEM_INCLUDE OR NOT DEEP_EP_NVSHMEM_DEVICE OR NOT DEEP_EP_NVSHMEM_HOST)
    set(reason "not found (set NVSHMEM_HOME, or pip install nvidia-nvshmem-cu13)")
  else()
    file(STRINGS ${DEEP_EP_NVSHMEM_INCLUDE}/non_abi/nvshmem_version.h lines
         REGEX "#define NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION ")
    string(REGEX REPLACE "[^0-9;]" "" numbers "${lines}")
    string(REPLACE ";" "." version "${numbers}")
    if(version VERSION_LESS 3.2)
      set(reason "${DEEP_EP_NVSHMEM_INCLUDE} is of version ${version}, 3.2 is needed")
    endif()
  endif()
endif()

if(reason STREQUAL "")
  set(DEEP_EP_NVSHMEM_ON ON)
  add_library(deep_ep_nvshmem_library INTERFACE)
  target_include_directories(deep_ep_nvshmem_library SYSTEM INTERFACE ${DEEP_EP_NVSHMEM_INCLUDE})
  target_link_libraries(deep_ep_nvshmem_library INTERFACE ${DEEP_EP_NVSHMEM_DEVICE} ${DEEP_EP_NVSHMEM_HOST})
  deep_ep_part("NVSHMEM" ON "${version}, ${DEEP_EP_NVSHMEM_HOST}")
elseif(DEEP_EP_NVSHMEM STREQUAL "ON")
  message(FATAL_ERROR "DEEP_EP_NVSHMEM=ON, but ${reason}")
else()
  deep_ep_part("NVSHMEM" OFF "${reason}")
endif()

# cmake -DPROGRAM=... -DVARIANT=sound|relaxed -P run_canary.cmake
set(ENV{TSAN_OPTIONS} exitcode=66)
execute_process(COMMAND ${PROGRAM} RESULT_VARIABLE code OUTPUT_VARIABLE text ERROR_VARIABLE text)
if(text MATCHES "unexpected memory mapping")
  # Older runtimes cannot live with as much address randomisation as newer kernels use.
  execute_process(COMMAND setarch -R ${PROGRAM} RESULT_VARIABLE code OUTPUT_VARIABLE text ERROR_VARIABLE text)
endif()

if(VARIANT STREQUAL sound)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "the sound program ended with ${code}:\n${text}")
  endif()
elseif(NOT code EQUAL 66 OR NOT text MATCHES "data race")
  message(FATAL_ERROR "no race was reported although a release was relaxed; ended with ${code}:\n${text}")
endif()

include(CMakePackageConfigHelpers)
set(deep_ep_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/deep_ep)

install(TARGETS deep_ep EXPORT deep_ep_targets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
        INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/deep_ep DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.hpp")
install(EXPORT deep_ep_targets NAMESPACE deep_ep:: DESTINATION ${deep_ep_package_dir})

set(deep_ep_compatibility SameMajorVersion)
if(PROJECT_VERSION_MAJOR EQUAL 0)
  set(deep_ep_compatibility SameMinorVersion)
endif()
write_basic_package_version_file(${PROJECT_BINARY_DIR}/deep_ep-config-version.cmake
                                 COMPATIBILITY ${deep_ep_compatibility})
file(WRITE ${PROJECT_BINARY_DIR}/deep_ep-config.cmake
     "include(\${CMAKE_CURRENT_LIST_DIR}/deep_ep_targets.cmake)\n")
install(FILES ${PROJECT_BINARY_DIR}/deep_ep-config.cmake ${PROJECT_BINARY_DIR}/deep_ep-config-version.cmake
        DESTINATION ${deep_ep_package_dir})

# Relative paths, so that the installed tree can be moved.
file(RELATIVE_PATH deep_ep_pc_up /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(${CMAKE_CURRENT_LIST_DIR}/deep_ep.pc.in ${PROJECT_BINARY_DIR}/deep_ep.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/deep_ep.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

if(TARGET deepep)
  install(TARGETS deepep RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
# Loaded at run time, from beside libdeep_ep.so or from lib/ beside the tool's folder.
foreach(plugin deep_ep_cuda deep_ep_nvshmem deep_ep_ucx)
  if(TARGET ${plugin})
    install(TARGETS ${plugin} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  endif()
endforeach()

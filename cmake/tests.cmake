# kernels_test: the kernels without Python or torch, so that the sanitizers see every thread.
# One ctest entry per instruction set; the test exits 77 where this CPU lacks it.

enable_testing()
find_package(Threads REQUIRED)
add_executable(kernels_test csrc/tests/kernels_test.cpp)
target_link_libraries(kernels_test PRIVATE build_flags ${KERNEL_TARGETS} Threads::Threads)
foreach(level IN LISTS ISA_LEVELS)
  add_test(NAME kernels_${level} COMMAND kernels_test)
  set_tests_properties(kernels_${level} PROPERTIES
    ENVIRONMENT SAE_FAST_ISA=${level} SKIP_RETURN_CODE 77)
endforeach()

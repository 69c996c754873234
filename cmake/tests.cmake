# kernels_test: the kernels without Python or torch, so that the sanitizers see every thread.
# One ctest entry per instruction set; the test exits 77 where this CPU lacks it.

enable_testing()
find_package(Threads REQUIRED)
set(TEST_SOURCES
  csrc/tests/kernels_test.cpp
  csrc/tests/encode_test.cpp
  csrc/tests/decode_test.cpp
  csrc/tests/rows_test.cpp)
add_executable(kernels_test ${TEST_SOURCES})
# A constructor's arguments are named as the members they fill.
set_source_files_properties(${TEST_SOURCES} PROPERTIES COMPILE_OPTIONS -Wno-shadow)
target_link_libraries(kernels_test PRIVATE build_flags ${KERNEL_TARGETS} Threads::Threads)
foreach(level IN LISTS ISA_LEVELS)
  add_test(NAME kernels_${level} COMMAND kernels_test)
  set_tests_properties(kernels_${level} PROPERTIES
    ENVIRONMENT SAE_FAST_ISA=${level} SKIP_RETURN_CODE 77)
endforeach()

# common_test: the arithmetic that host and device share.
add_executable(common_test csrc/tests/common_test.cpp)
set_source_files_properties(csrc/tests/common_test.cpp PROPERTIES COMPILE_OPTIONS -Wno-shadow)
target_link_libraries(common_test PRIVATE build_flags)
add_test(NAME common COMMAND common_test)

# kernels_test: the kernels without Python or torch, so that the sanitizers know every thread.
# One ctest entry per instruction set; the test exits with 77 if this CPU lacks it.

enable_testing()
find_package(Threads REQUIRED)
set(TEST_SOURCES
  csrc/tests/kernels_test.cpp
  csrc/tests/correlation_test.cpp
  csrc/tests/encode_test.cpp
  csrc/tests/decode_test.cpp
  csrc/tests/dense_product_test.cpp
  csrc/tests/gather_rows_test.cpp
  csrc/tests/moments_test.cpp
  csrc/tests/rows_test.cpp)
add_executable(kernels_test ${TEST_SOURCES})
# Constructor arguments have the names of the members they initialise.
set_source_files_properties(${TEST_SOURCES} PROPERTIES COMPILE_OPTIONS -Wno-shadow)
target_link_libraries(kernels_test PRIVATE build_flags ${KERNEL_TARGETS} Threads::Threads)
if("amx_emulated" IN_LIST ISA_LEVELS)
  target_sources(kernels_test PRIVATE csrc/tests/tiles_test.cpp)
  set_source_files_properties(csrc/tests/tiles_test.cpp PROPERTIES COMPILE_OPTIONS
    "-Wno-shadow;-ffp-contract=fast;-mfma" COMPILE_DEFINITIONS
    "SAE_FAST_ISA=tiles_test;SAE_FAST_TILES;SAE_FAST_EMULATE_TILES")
  target_compile_definitions(kernels_test PRIVATE ${dispatch_definitions})
  add_library(tile_case_emulated OBJECT csrc/tests/tile_case.cpp)
  target_compile_definitions(tile_case_emulated PRIVATE
    SAE_FAST_ISA=tile_case_emulated SAE_FAST_EMULATE_TILES)
  target_link_libraries(tile_case_emulated PRIVATE build_flags)
  target_link_libraries(kernels_test PRIVATE tile_case_emulated)
  if("amx" IN_LIST ISA_LEVELS)
    add_library(tile_case_hardware OBJECT csrc/tests/tile_case.cpp)
    target_compile_definitions(tile_case_hardware PRIVATE SAE_FAST_ISA=tile_case_hardware)
    target_link_libraries(tile_case_hardware PRIVATE build_flags)
    target_link_libraries(kernels_test PRIVATE tile_case_hardware)
  endif()
endif()
set(problems 30)  # the period of their kinds: one in ten is large, numbers are of three kinds
if(SAE_FAST_SANITIZE MATCHES thread)
  set(problems 12)  # every problem uses as many threads and takes several times longer
endif()
math(EXPR emulated_problems "${problems} / 3")  # tiles in memory take five times longer
foreach(level IN LISTS ISA_LEVELS)
  set(level_problems ${problems})
  if(level STREQUAL "amx_emulated")
    set(level_problems ${emulated_problems})
  endif()
  add_test(NAME kernels_${level} COMMAND kernels_test ${level_problems})
  set_tests_properties(kernels_${level} PROPERTIES
    ENVIRONMENT SAE_FAST_ISA=${level} SKIP_RETURN_CODE 77)
endforeach()

if(NOT SAE_FAST_SANITIZE MATCHES "thread")
  # common_test: the arithmetic that host and device share. It starts no threads.
  set(COMMON_TEST_SOURCES csrc/tests/common_test.cpp csrc/tests/common_moments_test.cpp)
  add_executable(common_test ${COMMON_TEST_SOURCES})
  set_source_files_properties(${COMMON_TEST_SOURCES} PROPERTIES COMPILE_OPTIONS -Wno-shadow)
  target_link_libraries(common_test PRIVATE build_flags)
  add_test(NAME common COMMAND common_test)

  # cuda_kernels_test: the CUDA kernels on the host, with csrc/tests/cuda_emulation instead of
  # CUDA's headers. Its threads are fibers, which ThreadSanitizer does not support.
  set(CUDA_TEST_SOURCES
    csrc/tests/cuda_emulation/emulation.cpp
    csrc/tests/cuda_kernels_test.cpp
    csrc/tests/cuda_batch_test.cpp
    csrc/tests/cuda_bookkeeping_test.cpp
    csrc/tests/cuda_correlation_test.cpp
    csrc/tests/cuda_decode_test.cpp
    csrc/tests/cuda_decorrelation_test.cpp
    csrc/tests/cuda_encode_test.cpp
    csrc/tests/cuda_gather_rows_test.cpp
    csrc/tests/cuda_rows_test.cpp
    csrc/tests/cuda_threshold_test.cpp
    csrc/tests/cuda_update_test.cpp)
  add_executable(cuda_kernels_test ${CUDA_TEST_SOURCES})
  set_source_files_properties(${CUDA_TEST_SOURCES} PROPERTIES
    COMPILE_OPTIONS "-Wno-shadow;-Wno-unknown-pragmas")
  # Where a fiber's turn ends, the compiler would keep values in registers that the other fibers
  # change: it sees that the called function itself leaves them alone.
  set_property(SOURCE csrc/tests/cuda_emulation/emulation.cpp APPEND PROPERTY
    COMPILE_OPTIONS $<$<CXX_COMPILER_ID:GNU>:-fno-ipa-ra>)
  target_include_directories(cuda_kernels_test BEFORE PRIVATE csrc/tests/cuda_emulation)
  target_link_libraries(cuda_kernels_test PRIVATE build_flags)
  add_test(NAME cuda_kernels COMMAND cuda_kernels_test)
endif()

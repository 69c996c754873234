# The CUDA backend: kernels that include no torch, and ops over torch's stable ABI.
#
# With SAE_FAST_CUDA both are linked into the module, which needs a CUDA torch. SAE_FAST_CUDA_CHECK
# compiles all of them against any torch, for the architectures they are tuned for, without linking.

if(SAE_FAST_CUDA_CHECK AND NOT SAE_FAST_CUDA AND NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 100-real)
endif()
include(cmake/cuda_architectures.cmake)  # sets CMAKE_CUDA_ARCHITECTURES
enable_language(CUDA)
if(CMAKE_CUDA_ARCHITECTURES STREQUAL "all-major")
  cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
  announce_architectures("${CMAKE_CUDA_ARCHITECTURES_ALL_MAJOR}" ${cores})
endif()
find_package(CUDAToolkit REQUIRED)

add_library(cuda_kernels OBJECT ${CUDA_KERNEL_SOURCES})
target_link_libraries(cuda_kernels PRIVATE build_flags)

add_library(cuda_ops OBJECT ${CUDA_OPS_SOURCES})
target_link_libraries(cuda_ops PRIVATE build_flags torch_headers CUDA::cudart)
target_compile_definitions(cuda_ops PRIVATE USE_CUDA)  # declares the CUDA part of torch's shim

if(SAE_FAST_CUDA_CHECK)
  target_compile_options(cuda_kernels PRIVATE -Xptxas=-v)  # read by tools/cuda_resources.py
  add_custom_target(cuda_check DEPENDS cuda_kernels cuda_ops)
endif()

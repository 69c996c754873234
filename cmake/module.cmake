# The Python module sae_fast._C: ops over the kernels, and a pybind11 module with the build's facts.

if(NOT pybind11_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
find_package(pybind11 2.13 CONFIG REQUIRED)

add_library(ops OBJECT ${OPS_SOURCES})
target_link_libraries(ops PRIVATE build_flags torch_headers)

# No torch include folder here: torch ships an older pybind11 of its own.
python_add_library(_C MODULE WITH_SOABI csrc/module.cpp)
target_link_directories(_C PRIVATE ${TORCH_ROOT}/lib)
target_link_libraries(_C PRIVATE build_flags ops ${KERNEL_TARGETS} pybind11::headers torch_cpu)
if(SAE_FAST_CUDA)
  target_link_libraries(_C PRIVATE cuda_kernels cuda_ops torch_cuda CUDA::cudart)
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " cuda_architectures)
  set(cuda_version ${CMAKE_CUDA_COMPILER_VERSION})
  set(why_no_cuda "")
else()
  set(cuda_architectures "")
  set(cuda_version "")
  set(why_no_cuda "${SAE_FAST_WHY_NO_CUDA}")
endif()

list(JOIN ISA_LEVELS " " isa_levels)
target_compile_definitions(_C PRIVATE
  SAE_FAST_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  SAE_FAST_TORCH_VERSION="${torch_version}"
  SAE_FAST_ISA_LEVELS="${isa_levels}"
  SAE_FAST_CUDA_VERSION="${cuda_version}"
  SAE_FAST_CUDA_ARCHITECTURES="${cuda_architectures}"
  SAE_FAST_WHY_NO_CUDA="${why_no_cuda}")

if(SAE_FAST_IN_TREE)  # like setup.py; removed first, because Python may have it mapped
  add_custom_command(TARGET _C POST_BUILD
    COMMAND ${CMAKE_COMMAND} -E rm -f ${CMAKE_SOURCE_DIR}/sae_fast/$<TARGET_FILE_NAME:_C>
    COMMAND ${CMAKE_COMMAND} -E copy $<TARGET_FILE:_C> ${CMAKE_SOURCE_DIR}/sae_fast)
endif()

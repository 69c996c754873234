# The torch to compile against: only its stable ABI, so that one binary runs with 2.11 and newer.
#
# TorchConfig.cmake is not used: in a CUDA build of torch it requires the whole CUDA toolkit, even
# for a CPU-only extension, and it adds MKL's folders to the run path.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
if(NOT TORCH_ROOT)
  execute_process(COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('torch').origin).parent)"
    OUTPUT_VARIABLE torch_root OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(TORCH_ROOT ${torch_root} CACHE PATH "" FORCE)
endif()
file(STRINGS ${TORCH_ROOT}/version.py torch_version REGEX "^__version__ = ")
string(REGEX REPLACE ".*'(.*)'.*" "\\1" torch_version "${torch_version}")

add_library(torch_headers INTERFACE)
target_include_directories(torch_headers SYSTEM INTERFACE ${TORCH_ROOT}/include)
target_compile_options(torch_headers INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-fmacro-prefix-map=${TORCH_ROOT}/include/=>)
target_compile_definitions(torch_headers INTERFACE
  TORCH_TARGET_VERSION=0x020b000000000000)  # 2.11, equal to OLDEST_TORCH in tools/build_backend.py

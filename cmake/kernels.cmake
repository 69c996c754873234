# The CPU kernels: one object library per instruction set, all in one binary.
#
# Each file of ISA_SOURCES is compiled for every level. SAE_FAST_ISA names the level and is the
# namespace that keeps the copies apart. These files must define no name outside that namespace that
# the linker could merge with another level's copy (tools/isa_symbols.py checks this).

set(isa_flags_portable "")
set(isa_flags_avx2 -mavx2 -mfma -mf16c)
set(isa_flags_avx512 ${isa_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(isa_flags_avx512vnni ${isa_flags_avx512} -mavx512vnni)

set(isa_flags_amx ${isa_flags_avx512vnni} -mavx512bf16 -mavx512vbmi2)
set(isa_flags_amx_emulated ${isa_flags_avx2})
set(isa_definitions_amx SAE_FAST_TILES)
set(isa_definitions_amx_emulated SAE_FAST_TILES SAE_FAST_EMULATE_TILES)

set(ISA_LEVELS portable)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND ISA_LEVELS avx2 avx512 avx512vnni)
  include(CheckCXXSourceCompiles)  # the assembler may be older than the compiler
  check_cxx_source_compiles("int main() { asm volatile(\"tdpbf16ps %tmm2, %tmm1, %tmm0\"); }"
    SAE_FAST_HAS_TILE_INSTRUCTIONS)
  if(SAE_FAST_HAS_TILE_INSTRUCTIONS AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
    list(APPEND ISA_LEVELS amx)
  endif()
  if(SAE_FAST_TESTS)  # the kernels of level amx on tiles in memory, for any processor with AVX2
    list(APPEND ISA_LEVELS amx_emulated)
  endif()
endif()
if(SAE_FAST_SANITIZE MATCHES thread)
  # The threads of all levels run the same code, apart from the code for tiles. ThreadSanitizer sees
  # the loads and stores of emulated tiles, and misses the ones of tile instructions.
  list(FILTER ISA_LEVELS INCLUDE REGEX "^(portable|amx_emulated)$")
elseif(SAE_FAST_SANITIZE)
  # avx512vnni differs from avx512 in one instruction between registers. Levels that the processor
  # cannot run would be skipped by the tests, and the module is compiled with them all the same.
  list(REMOVE_ITEM ISA_LEVELS avx512vnni)
  include(CheckCXXSourceRuns)
  if("avx512" IN_LIST ISA_LEVELS)
    check_cxx_source_runs("int main() { return !__builtin_cpu_supports(\"avx512vl\"); }"
      SAE_FAST_RUNS_AVX512)
    if(NOT SAE_FAST_RUNS_AVX512)
      list(REMOVE_ITEM ISA_LEVELS avx512)
    endif()
  endif()
  if("amx" IN_LIST ISA_LEVELS)
    check_cxx_source_runs("#include <cpuid.h>
      int main() {
        unsigned a = 0, b = 0, c = 0, d = 0;
        return !(__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1));
      }" SAE_FAST_RUNS_TILES)
    if(NOT SAE_FAST_RUNS_TILES)
      list(REMOVE_ITEM ISA_LEVELS amx)
    endif()
  endif()
endif()
set(dispatch_definitions "")
foreach(level IN LISTS ISA_LEVELS)
  string(TOUPPER SAE_FAST_WITH_${level} definition)
  list(APPEND dispatch_definitions ${definition})
endforeach()

# Contraction improves accuracy and speed; -ffast-math would break NaN and infinities.
add_library(kernel_flags INTERFACE)
target_link_libraries(kernel_flags INTERFACE build_flags)
target_compile_options(kernel_flags INTERFACE -ffp-contract=fast -fno-trapping-math
  # GCC warns about its own AVX-512 headers, where a value is undefined on purpose.
  $<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized -Wno-maybe-uninitialized>)

add_library(kernels OBJECT ${KERNEL_SOURCES})
target_link_libraries(kernels PRIVATE kernel_flags)
target_compile_definitions(kernels PRIVATE ${dispatch_definitions})
set(KERNEL_TARGETS kernels)
foreach(level IN LISTS ISA_LEVELS)
  set(optimization -O3)
  if(level STREQUAL "portable")
    set(optimization -O2)  # as fast, and compiled in half of the time
  endif()
  add_library(kernels_${level} OBJECT ${ISA_SOURCES})
  target_link_libraries(kernels_${level} PRIVATE kernel_flags)
  target_compile_options(kernels_${level} PRIVATE
    ${isa_flags_${level}} $<$<CONFIG:Release>:${optimization}>)
  target_compile_definitions(kernels_${level} PRIVATE SAE_FAST_ISA=${level} ${isa_definitions_${level}})
  list(APPEND KERNEL_TARGETS kernels_${level})
endforeach()

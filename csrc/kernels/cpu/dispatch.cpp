#include "kernels/cpu/dispatch.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sae_fast {

// Defined by CMake are SAE_FAST_WITH_<LEVEL> of all levels that are compiled in.
namespace portable {
const cpu::Kernels& kernel_table();
}
#if defined(SAE_FAST_WITH_AVX2)
namespace avx2 {
const cpu::Kernels& kernel_table();
}
#endif
#if defined(SAE_FAST_WITH_AVX512)
namespace avx512 {
const cpu::Kernels& kernel_table();
}
#endif
#if defined(SAE_FAST_WITH_AVX512VNNI)
namespace avx512vnni {
const cpu::Kernels& kernel_table();
}
#endif
#if defined(SAE_FAST_WITH_AMX)
namespace amx {
const cpu::Kernels& kernel_table();
}
#endif
#if defined(SAE_FAST_WITH_AMX_EMULATED)
namespace amx_emulated {
const cpu::Kernels& kernel_table();
}
#endif

namespace cpu {
namespace {

#if defined(SAE_FAST_WITH_AMX)
bool has_tiles() {
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;  // of EDX
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (edx & kBFloat16) != 0 && (edx & kTiles) != 0 && (edx & kInt8) != 0;
}

// Asks Linux for the tile registers, once a process; returns 0 or the error. It
// refuses before version 5.16, in some sandboxes, and where a thread has a small signal stack.
int request_tiles() {
#if defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

int tile_permission() {
  static const int error = request_tiles();
  return error;
}
#endif

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables = {&portable::kernel_table()};
#if defined(__x86_64__)
  // The features of each level, as CMakeLists.txt compiles it.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return tables;
  }
#if defined(SAE_FAST_WITH_AMX_EMULATED)
  tables.push_back(&amx_emulated::kernel_table());
#endif
#if defined(SAE_FAST_WITH_AVX2)
  tables.push_back(&avx2::kernel_table());
#endif
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return tables;
  }
#if defined(SAE_FAST_WITH_AVX512)
  tables.push_back(&avx512::kernel_table());
#endif
  if (!__builtin_cpu_supports("avx512vnni")) return tables;
#if defined(SAE_FAST_WITH_AVX512VNNI)
  tables.push_back(&avx512vnni::kernel_table());
#endif
#if defined(SAE_FAST_WITH_AMX)
  if (has_tiles() && tile_permission() == 0) tables.push_back(&amx::kernel_table());
#endif
#endif
  return tables;
}

const Kernels& pick() {
  const std::vector<const Kernels*> tables = available();
  const char* wanted = std::getenv("SAE_FAST_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.back();
  std::string names;
  for (const Kernels* table : tables) {
    if (std::string(table->instruction_set) == wanted) return *table;
    names += names.empty() ? "" : ", ";
    names += table->instruction_set;
  }
  throw std::runtime_error("SAE_FAST_ISA must be one of " + names + " on this processor, got " +
                           std::string(wanted));
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = pick();
  return table;
}

std::string instruction_set_name() { return kernels().instruction_set; }

std::string refused_instruction_set() {
#if defined(SAE_FAST_WITH_AMX)
  if (has_tiles() && tile_permission() != 0) {
    return std::string("amx: the operating system does not hand out the tile registers (") +
           std::strerror(tile_permission()) + ")";
  }
#endif
  return "";
}

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : available()) names.emplace_back(table->instruction_set);
  return names;
}

}  // namespace cpu
}  // namespace sae_fast

#include "kernels/cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace sae_fast {

namespace portable {
const cpu::Kernels& kernel_table();
}
#if defined(__x86_64__)
namespace avx2 {
const cpu::Kernels& kernel_table();
}
namespace avx512 {
const cpu::Kernels& kernel_table();
}
namespace avx512vnni {
const cpu::Kernels& kernel_table();
}
#endif

namespace cpu {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables = {&portable::kernel_table()};
#if defined(__x86_64__)
  // The features of each level, as CMakeLists.txt compiles it.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return tables;
  }
  tables.push_back(&avx2::kernel_table());
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return tables;
  }
  tables.push_back(&avx512::kernel_table());
  if (__builtin_cpu_supports("avx512vnni")) tables.push_back(&avx512vnni::kernel_table());
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

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* table : available()) names.emplace_back(table->instruction_set);
  return names;
}

}  // namespace cpu
}  // namespace sae_fast

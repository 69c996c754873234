// The pybind11 module sae_fast._C: how this build was made and what runs on this CPU.
// The tensor ops register themselves with torch when the module is loaded (ops/schema.cpp).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "kernels/cpu/dispatch.h"

namespace py = pybind11;

namespace {

// Found by searching the file where the module cannot be loaded (sae_fast/ops/native.py).
[[gnu::used]] const char kBuiltWith[] = "sae_fast built with torch " SAE_FAST_TORCH_VERSION;

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = SAE_FAST_COMPILER;
  info["torch"] = SAE_FAST_TORCH_VERSION;
  info["instruction_sets"] = words(SAE_FAST_ISA_LEVELS);
  info["cuda"] = SAE_FAST_CUDA_VERSION;
  info["cuda_architectures"] = words(SAE_FAST_CUDA_ARCHITECTURES);
  info["why_no_cuda"] = SAE_FAST_WHY_NO_CUDA;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "Compiler, torch, instruction sets and CUDA of this build.");
  m.def("instruction_set", &sae_fast::cpu::instruction_set_name,
        "Name of the instruction set that the CPU kernels use.");
  m.def("available_instruction_sets", &sae_fast::cpu::available_instruction_sets,
        "Names of the instruction sets that were compiled in and that this CPU has.");
}

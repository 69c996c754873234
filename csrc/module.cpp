// The pybind11 module sae_fast._C: how this build was made and what runs on this CPU.
// The tensor ops register themselves with torch when the module is loaded (ops/schema.cpp).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <exception>
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

std::terminate_handler terminate_before = nullptr;
unsigned long main_thread = 0;

// At the interpreter's end a daemon thread that wants to go back to Python, from an op of ours or
// of torch, is unwound by CPython before 3.14 and so ends the process in std::terminate. It sleeps
// here instead, as it does in 3.14, until the main thread has ended the process.
void terminate_or_sleep() {
#if PY_VERSION_HEX >= 0x030D0000
  const bool at_the_end = Py_IsFinalizing() != 0;
#else
  const bool at_the_end = _Py_IsFinalizing() != 0;
#endif
  const bool is_main = PyThread_get_thread_ident() == main_thread;
  while (at_the_end && !is_main && std::current_exception() == nullptr) pause();
  terminate_before();
}

void end_quietly() {
  const py::object main = py::module_::import("threading").attr("main_thread")();
  main_thread = main.attr("ident").cast<unsigned long>();
  terminate_before = std::set_terminate(terminate_or_sleep);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  end_quietly();
  m.def("build_info", &build_info, "Compiler, torch, instruction sets and CUDA of this build.");
  m.def("instruction_set", &sae_fast::cpu::instruction_set_name,
        "Name of the instruction set that the CPU kernels use.");
  m.def("available_instruction_sets", &sae_fast::cpu::available_instruction_sets,
        "Names of the instruction sets that were compiled in and that this CPU has.");
  m.def("refused_instruction_set", &sae_fast::cpu::refused_instruction_set,
        "An instruction set that this CPU has and the operating system refuses, with the reason.");
}

// The kernels of the instruction set in use. Several levels are compiled into one binary; the best
// that this processor has is picked once, or the one named by the variable SAE_FAST_ISA.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace sae_fast::cpu {

// Throws std::runtime_error if SAE_FAST_ISA names a level that is unknown or not available.
const Kernels& kernels();

std::string instruction_set_name();
// Levels compiled in that this processor can run, slowest first.
std::vector<std::string> available_instruction_sets();
// A level that the processor has and the operating system refuses, with the reason; else empty.
std::string refused_instruction_set();

}  // namespace sae_fast::cpu

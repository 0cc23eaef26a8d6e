// Which instructions this processor has, and which of the library's kernels to take.
#pragma once
#include "kernels.hpp"

namespace tinyvit {

// The kernels for a precision. `isa` names one, or is null or "" for the best; the environment
// variable TINYVIT_ISA (read at every call) lowers the best. Throws Error for an ISA that the
// library or the processor lacks. With `splits` fp32 products may be taken by parts, see Kernels::split.
const Kernels* choose_kernels(bool is_bf16, const char* isa, bool splits = false);

// Whether these kernels' bf16 products are instructions rather than emulated.
bool multiplies_bf16(const Kernels& kernels);

// CPUs that this process may use.
int cpus();

}  // namespace tinyvit

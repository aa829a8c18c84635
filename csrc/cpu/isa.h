// Run-time choice of the instruction set, so that one binary serves every machine.
#pragma once

#include "common.h"

namespace ctt {

enum class Isa { base, v3, v4 };  // x86-64 as ever; with AVX2 and FMA; with AVX-512

// The best of this machine, or the lower one that CTT_CPU_ISA in the environment names. Throws where
// it names none; called when the module is imported, so that no kernel meets that.
Isa isa();
const char* isa_name();

#if defined(CTT_X86_DISPATCH)
template <auto Body, class... A>
__attribute__((target("arch=x86-64-v3"))) void run_v3(const A&... arguments) {
  Body(arguments...);
}

template <auto Body, class... A>
__attribute__((target("arch=x86-64-v4"))) void run_v4(const A&... arguments) {
  Body(arguments...);
}
#endif

// Calls Body, a CTT_INLINE function, as compiled for isa(). Only what is inlined into it is.
template <auto Body, class... A>
void per_isa(const A&... arguments) {
#if defined(CTT_X86_DISPATCH)
  if (isa() == Isa::v4) return run_v4<Body>(arguments...);
  if (isa() == Isa::v3) return run_v3<Body>(arguments...);
#endif
  Body(arguments...);
}

}  // namespace ctt

#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ctt {
namespace {

const char* const kNames[] = {"base", "x86-64-v3", "x86-64-v4"};

Isa best() {
#if defined(CTT_X86_DISPATCH)
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::v4;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::v3;
#endif
  return Isa::base;
}

Isa choose() {
  const char* asked = std::getenv("CTT_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return best();
  for (const Isa one : {Isa::base, Isa::v3, Isa::v4}) {
    if (kNames[static_cast<int>(one)] == std::string(asked) && one <= best()) return one;
  }
  throw std::invalid_argument(std::string("CTT_CPU_ISA must be one of base, x86-64-v3 and "
                                          "x86-64-v4 that this machine has, got ") +
                              asked);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace ctt

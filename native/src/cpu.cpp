// Which instructions this processor has, and which of the library's kernels to take.
#include "cpu.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "error.hpp"
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define TINYVIT_X86 1
#endif
#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tinyvit {
namespace {

struct Features {
  bool avx2 = false, avx512 = false, avx512bf16 = false, amx = false;
};

#ifdef TINYVIT_X86
uint64_t enabled_state() {  // which registers the kernel saves
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the tile registers only to a process that asks.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  const int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool has_xsave = c & (1u << 27), has_fma = c & (1u << 12);
  if (!has_xsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint32_t b7 = b, d7 = d;
  const uint64_t state = enabled_state();
  f.avx2 = has_fma && (b7 & (1u << 5)) && (state & 6) == 6;
  const uint32_t wanted = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  f.avx512 = f.avx2 && (b7 & wanted) == wanted && (state & 0xe6) == 0xe6;
  if (f.avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512bf16 = a & (1u << 5);
  const bool has_tiles = (d7 & (1u << 24)) && (d7 & (1u << 22)) && (state & 0x60000) == 0x60000;
  f.amx = f.avx512bf16 && has_tiles && may_use_tiles();
  return f;
}
#else
Features detect() { return Features(); }
#endif

struct Entry {
  const char* name;
  const Kernels* (*kernels)(bool);
  bool is_here;
  const Kernels* (*splitting)() = nullptr;
};

}  // namespace

const Kernels* choose_kernels(bool is_bf16, const char* isa, bool splits) {
  const Features f = detect();
  const Entry entries[] = {
#ifdef TINYVIT_HAS_AMX
      {"amx", amx::kernels, f.amx, amx::splitting_kernels},
#endif
#ifdef TINYVIT_HAS_AVX512BF16
      {"avx512bf16", avx512bf16::kernels, f.avx512bf16},
#endif
#ifdef TINYVIT_HAS_AVX512
      {"avx512", avx512::kernels, f.avx512},
#endif
#ifdef TINYVIT_HAS_AVX2
      {"avx2", avx2::kernels, f.avx2},
#endif
      {"generic", generic::kernels, true},
  };
  (void)f;
  const char* lowered = std::getenv("TINYVIT_ISA");
  const std::string wanted = isa && *isa ? isa : lowered ? lowered : "";
  bool is_below = wanted.empty();
  for (const Entry& e : entries) {
    const bool is_it = wanted == e.name;
    if (is_it && !e.is_here)
      throw Error(TINYVIT_UNSUPPORTED, "this processor or its kernel has no " + wanted);
    is_below = is_below || is_it;
    if (!is_below || !e.is_here) continue;
    if (splits && e.splitting)
      if (const Kernels* k = e.splitting()) return k;
    if (const Kernels* k = e.kernels(is_bf16)) return k;  // fp32 of avx512bf16 is that of avx512
  }
  throw Error(TINYVIT_INVALID, "unknown instruction set '" + wanted +
                                   "'; one of amx, avx512bf16, avx512, avx2, generic");
}

bool multiplies_bf16(const Kernels& kernels) {
  return kernels.is_bf16 && (!std::strcmp(kernels.isa, "avx512bf16") || !std::strcmp(kernels.isa, "amx"));
}

int cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::max(std::thread::hardware_concurrency(), 1u));
}

}  // namespace tinyvit

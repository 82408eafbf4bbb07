// The best instruction set that was compiled and that this machine has.
#include "dispatch.h"

namespace jnorm {

bool available(Isa isa) {
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2:
#ifdef JNORM_HAVE_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::avx512:
#ifdef JNORM_HAVE_AVX512
      return available(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
      return false;
#endif
    case Isa::avx512_bf16:
#ifdef JNORM_HAVE_AVX512_BF16
      return available(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
  }
  return false;
}

Isa best_isa() {
  static const Isa best = [] {
    for (Isa isa : {Isa::avx512_bf16, Isa::avx512, Isa::avx2}) {
      if (available(isa)) return isa;
    }
    return Isa::baseline;
  }();
  return best;
}

const Leaf& leaf_of([[maybe_unused]] Isa isa) {
#ifdef JNORM_HAVE_AVX512_BF16
  if (isa == Isa::avx512_bf16) return avx512_bf16::leaf;
#endif
#ifdef JNORM_HAVE_AVX512
  if (isa == Isa::avx512) return avx512::leaf;
#endif
#ifdef JNORM_HAVE_AVX2
  if (isa == Isa::avx2) return avx2::leaf;
#endif
  return baseline::leaf;
}

}  // namespace jnorm

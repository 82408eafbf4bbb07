// The activations and their derivatives.
#pragma once

#include "vec.h"

namespace jnorm {
namespace JNORM_ISA {

// e^v: 2^n times a polynomial in what is left, |r| <= ln 2 / 2; 0 below the least normal number, infinity above the largest.
JNORM_INLINE F exp(F v) {
  v = v > 89.0f ? all(89.0f) : v;
  v = v < -88.0f ? all(-88.0f) : v;
  const F magic = all(12582912.0f);  // 1.5·2^23: the sum has the nearest integer in its last bits
  const F shifted = v * 1.44269504f + magic, n = shifted - magic;
  const F r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = all(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * bits<F>((bits<FI>(shifted) - bits<FI>(magic) + 127) << 23);
}
JNORM_INLINE D exp(D v) {
  v = v > 710.0 ? all(710.0) : v;
  v = v < -709.0 ? all(-709.0) : v;
  const D magic = all(6755399441055744.0);
  const D shifted = v * 1.4426950408889634 + magic, n = shifted - magic;
  const D r = (v - n * 0.693145751953125) - n * 1.42860682030941723212e-6;
  D p = all(1.0 / 6227020800.0);
  const double reciprocal[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                               1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0,        1.0};
  for (double c : reciprocal) p = p * r + c;
  return p * bits<D>((bits<DI>(shifted) - bits<DI>(magic) + 1023) << 52);
}

constexpr double kRootTwoOverPi = 0.79788456080286535588;
constexpr double kCubic = 0.044715;

template <class A> JNORM_INLINE V<A> sigmoid(V<A> z) { return A(1) / (A(1) + exp(-z)); }

// An activation that is known only when it runs: for what is rare, so that not everything is compiled five times.
constexpr Act kAnyAct = static_cast<Act>(-1);
// What is given is y, of no activation or leaky_relu: which, is known when it runs.
constexpr Act kOutput = static_cast<Act>(-2);
constexpr double kLeak = 0.01;

// The z of which y = act(z).
template <class A> JNORM_INLINE V<A> inverted(V<A> y, Act any) {
  const A steep = any == Act::leaky_relu ? A(1 / kLeak) : A(1);
  return y < 0 ? y * steep : y;
}

template <Act act, class A> JNORM_INLINE V<A> activate(V<A> z, Act any) {
  if constexpr (act == Act::none) return z;
  if constexpr (act == Act::relu) return z < 0 ? V<A>{} : z;
  if constexpr (act == Act::leaky_relu) return z < 0 ? z * A(kLeak) : z;
  if constexpr (act == Act::silu) return z * sigmoid<A>(z);
  if constexpr (act == Act::gelu) return z * sigmoid<A>(z * (A(2 * kRootTwoOverPi) + A(2 * kRootTwoOverPi * kCubic) * z * z));
  switch (any) {
    case Act::relu: return activate<Act::relu, A>(z, any);
    case Act::leaky_relu: return activate<Act::leaky_relu, A>(z, any);
    case Act::silu: return activate<Act::silu, A>(z, any);
    case Act::gelu: return activate<Act::gelu, A>(z, any);
    default: return z;
  }
}

// v times the derivative at z, 0 where v is.
template <Act act, class A> JNORM_INLINE V<A> times_slope(V<A> z, V<A> v, Act any) {
  if constexpr (act == Act::none) return v;
  if constexpr (act == Act::relu) return z > 0 ? v : V<A>{};
  if constexpr (act == Act::leaky_relu) return z >= 0 ? v : v * A(kLeak);
  if constexpr (act == kOutput) return z >= 0 ? v : v * (any == Act::leaky_relu ? A(kLeak) : A(1));
  if constexpr (act == Act::silu) {
    const V<A> s = sigmoid<A>(z), slope = s * (A(1) + z * (A(1) - s));
    return v == 0 ? V<A>{} : slope * v;
  }
  if constexpr (act == Act::gelu) {
    const V<A> square = z * z;
    const V<A> s = sigmoid<A>(z * (A(2 * kRootTwoOverPi) + A(2 * kRootTwoOverPi * kCubic) * square));
    const V<A> slope = s + (z * s * (A(1) - s)) * (A(2 * kRootTwoOverPi) + A(6 * kRootTwoOverPi * kCubic) * square);
    return v == 0 ? V<A>{} : slope * v;
  }
  switch (any) {
    case Act::relu: return times_slope<Act::relu, A>(z, v, any);
    case Act::leaky_relu: return times_slope<Act::leaky_relu, A>(z, v, any);
    case Act::silu: return times_slope<Act::silu, A>(z, v, any);
    case Act::gelu: return times_slope<Act::gelu, A>(z, v, any);
    default: return v;
  }
}

}  // namespace JNORM_ISA
}  // namespace jnorm

// What the kernels should compute, written from the formulas of kernels.h in long double, and how far from it they may be: bounds of the
// rounding in the arithmetic's type, for sums of at most kTerms terms in that type before they go on in a wider one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

namespace reference {

using jnorm::Act;
using jnorm::Type;
using Real = long double;
using Reals = std::vector<Real>;

constexpr Real kTerms = 160;
// Squares of deviations are taken around the mean of the first 8 rows of 128, and sum to at most (1 + 128 / 8) times those around the mean.
constexpr Real kSpread = 17;

struct Value {
  Real value, error;
};

inline Real unit(Type t) { return t == Type::f64 ? 0x1p-53L : 0x1p-24L; }

// ---- storage ----
struct Format {
  int digits, least, most;  // of the significand, and the exponents of normal numbers
};
inline Format format_of(Type t) {
  switch (t) {
    case Type::f64: return {53, -1022, 1023};
    case Type::f32: return {24, -126, 127};
    case Type::bf16: return {8, -126, 127};
    default: return {11, -14, 15};
  }
}
inline Real rounded(Type t, Real v) {
  if (!std::isfinite(v) || v == 0) return v;
  const Format f = format_of(t);
  const int exponent = std::max(std::ilogb(v), f.least);
  const Real step = std::ldexp(1.0L, exponent - f.digits + 1), r = std::nearbyint(v / step) * step;
  return std::fabs(r) >= std::ldexp(1.0L, f.most + 1) ? std::copysign(std::numeric_limits<Real>::infinity(), v) : r;
}
inline uint16_t half_bits(Type t, Real v) {
  if (t == Type::bf16) {
    const float f = static_cast<float>(v);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return static_cast<uint16_t>(std::isnan(v) ? 0x7fc0 : u >> 16);
  }
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return 0x7e00;
  if (std::isinf(v)) return sign | 0x7c00;
  const Real m = std::fabs(v);
  if (m < 0x1p-14L) return static_cast<uint16_t>(sign | static_cast<int>(m * 0x1p24L));
  const int e = std::ilogb(m);
  return static_cast<uint16_t>(sign | (e + 15) << 10 | (static_cast<int>(std::ldexp(m, 10 - e)) - 1024));
}
inline Real half_value(Type t, uint16_t bits) {
  if (t == Type::bf16) {
    const uint32_t u = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  const Real sign = bits & 0x8000 ? -1 : 1;
  const int e = bits >> 10 & 31, m = bits & 1023;
  if (e == 31) return m ? std::numeric_limits<Real>::quiet_NaN() : sign * std::numeric_limits<Real>::infinity();
  return sign * (e ? std::ldexp(1024.0L + m, e - 25) : std::ldexp(static_cast<Real>(m), -24));
}
template <class T> T element(const void* data, int64_t i) {
  T t;
  std::memcpy(&t, static_cast<const char*>(data) + i * sizeof t, sizeof t);
  return t;
}
inline Real get(Type t, const void* data, int64_t i) {
  if (t == Type::f64) return element<double>(data, i);
  if (t == Type::f32) return element<float>(data, i);
  return half_value(t, element<uint16_t>(data, i));
}
// v is representable.
inline void put(Type t, void* data, int64_t i, Real v) {
  const double d = static_cast<double>(v);
  const float f = static_cast<float>(v);
  const uint16_t h = jnorm::size_of(t) == 2 ? half_bits(t, v) : 0;
  const void* from = t == Type::f64 ? static_cast<const void*>(&d) : t == Type::f32 ? static_cast<const void*>(&f) : &h;
  std::memcpy(static_cast<char*>(data) + i * jnorm::size_of(t), from, jnorm::size_of(t));
}
// Whether `got` is what a number within `error` of `value` is stored as.
inline bool agrees(Type t, Real got, Value expected) {
  const Real value = expected.value, error = expected.error;
  if (std::isnan(value)) return std::isnan(got);
  if (std::isinf(value)) return got == value;
  if (!std::isfinite(error)) return true;
  return got >= rounded(t, value - error) && got <= rounded(t, value + error);
}

// ---- activations ----
inline Real sigmoid(Real z) { return 1 / (1 + std::exp(-z)); }
inline Real gelu_argument(Real z) { return 1.5957691216057307118L * (z + 0.044715L * z * z * z); }
inline Real activated(Act act, Real z) {
  switch (act) {
    case Act::relu: return z < 0 ? 0 : z;
    case Act::leaky_relu: return z < 0 ? 0.01L * z : z;
    case Act::silu: return z * sigmoid(z);
    case Act::gelu: return z * sigmoid(gelu_argument(z));
    default: return z;
  }
}
inline Real slope(Act act, Real z) {
  switch (act) {
    case Act::relu: return z > 0 ? 1 : 0;
    case Act::leaky_relu: return z >= 0 ? 1 : 0.01L;
    case Act::silu: return sigmoid(z) * (1 + z * sigmoid(-z));
    case Act::gelu: {
      const Real w = gelu_argument(z);
      return sigmoid(w) + z * sigmoid(w) * sigmoid(-w) * 1.5957691216057307118L * (1 + 3 * 0.044715L * z * z);
    }
    default: return 1;
  }
}
inline bool smooth(Act act) { return act == Act::silu || act == Act::gelu; }
// No slope here exceeds 1.13.
inline Value activated(Act act, Value z, Real u) {
  const Real evaluation = smooth(act) ? 12 * u * std::fabs(z.value) : 2 * u * std::fabs(z.value);
  return {activated(act, z.value), 1.13L * z.error + (act == Act::none ? 0 : evaluation)};
}
// The z of which y = act(z), for no activation and leaky_relu.
inline Value inverted(Act act, Real y, Real u) {
  if (act == Act::none || !(y < 0)) return {y, 0};
  return {y / 0.01L, u * std::fabs(y / 0.01L)};
}
// act'(z)·dy. Second derivatives do not exceed 1.2; 1 - sigmoid cancels down to u, times at most |z|·(1.6 + 0.22·z²) until it is 0.
inline Value times_slope(Act act, Value z, Real dy, Real u) {
  if (act == Act::none || dy == 0) return {dy, 0};
  const Real s = slope(act, z.value), m = std::min(std::fabs(z.value), 10.0L);
  Real error = 2 * u * std::fabs(s);
  if (smooth(act)) {
    error += 1.2L * z.error + u * (24 + m * (2 + 0.25L * m * m));
  } else if (std::fabs(z.value) < z.error) {
    error += 1;
  }
  return {s * dy, error * std::fabs(dy)};
}

// ---- statistics ----
struct Moments {
  Real n = 0, mean = 0, m2 = 0, mean_error = 0, m2_error = 0;
};
// `v` are the counted values. Something near the mean is subtracted first, so that what is summed is not larger than their range.
inline Moments moments(const Reals& v, Real u) {
  Moments s;
  s.n = static_cast<Real>(v.size());
  if (v.empty()) return s;
  Real sum = 0, first = v[0], low = v[0], high = v[0];
  for (Real x : v) {
    sum += x - first;
    low = std::min(low, x);
    high = std::max(high, x);
  }
  s.mean = first + sum / s.n;
  Real absolute = 0;
  for (Real x : v) {
    s.m2 += (x - s.mean) * (x - s.mean);
    absolute += std::fabs(x - s.mean);
  }
  const Real range = high - low;
  s.mean_error = kTerms * u * range + 4 * u * u * std::fabs(s.mean);
  const Real deviation = 2 * u * range + s.mean_error;
  s.m2_error = kTerms * kSpread * u * s.m2 + 2 * deviation * absolute + s.n * deviation * deviation;
  return s;
}
// 1/√(square + epsilon), 0 where nothing is counted or there is nothing to divide by.
inline Value rstd_of(const Moments& s, Real epsilon, Real u) {
  const Real total = s.m2 / std::max(s.n, 1.0L) + epsilon;
  if (s.n == 0 || total == 0) return {0, 0};
  const Real r = 1 / std::sqrt(total);
  return {r, r * (s.m2_error / std::max(s.n, 1.0L) / total + 4 * u)};
}

// A sum of values of which each has an error, in blocks.
struct Sum {
  Real value = 0, error = 0, absolute = 0;
  void add(Value v) {
    value += v.value;
    error += v.error;
    absolute += std::fabs(v.value);
  }
  Value of(Real u) const { return {value, error + kTerms * u * absolute}; }
};
inline Value times(Value a, Real b, Real u) { return {a.value * b, (a.error + u * std::fabs(a.value)) * std::fabs(b)}; }
inline Value times(Value a, Value b, Real u) {
  const Real x = std::fabs(a.value), y = std::fabs(b.value);
  return {a.value * b.value, a.error * y + b.error * x + a.error * b.error + u * x * y};
}
inline Value plus(Value a, Value b, Real u) {
  return {a.value + b.value, a.error + b.error + u * (std::fabs(a.value) + std::fabs(b.value))};
}
inline std::vector<Value> values_of(const std::vector<Sum>& sums, Real u) {
  std::vector<Value> v;
  for (const Sum& s : sums) v.push_back(s.of(u));
  return v;
}

// x minus the mean, which is held in two numbers.
inline Value deviation(const Moments& s, Real x, Real u) {
  const Real d = x - s.mean;
  return {d, 4 * u * std::fabs(d) + s.mean_error};
}

}  // namespace reference

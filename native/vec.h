// Vectors of 64 bytes in the compiler's own vector types, and what is stored in narrower types than it is computed in.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "leaf.h"

#define JNORM_INLINE inline __attribute__((always_inline))

namespace jnorm {
namespace JNORM_ISA {

typedef float F __attribute__((vector_size(64)));
typedef int32_t FI __attribute__((vector_size(64)));
typedef uint32_t FU __attribute__((vector_size(64)));
typedef double D __attribute__((vector_size(64)));
typedef int64_t DI __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class A> struct Traits;
template <> struct Traits<float> {
  using V = F;
  using I = FI;
  using Wide = double;
  static constexpr int64_t N = 16;
};
template <> struct Traits<double> {
  using V = D;
  using I = DI;
  using Wide = long double;
  static constexpr int64_t N = 8;
};
template <class A> using V = typename Traits<A>::V;
template <class A> using I = typename Traits<A>::I;
template <class A> using Wide = typename Traits<A>::Wide;

template <class T, class P> JNORM_INLINE T read_as(const P* p) {
  T t;
  memcpy(&t, p, sizeof t);
  return t;
}
template <class T, class U> JNORM_INLINE T bits(U u) {
  static_assert(sizeof(T) == sizeof(U), "same size");
  T t;
  memcpy(&t, &u, sizeof t);
  return t;
}
template <class A> JNORM_INLINE V<A> all(A a) { return V<A>{} + a; }

JNORM_INLINE F load(const float* p) { return read_as<F>(p); }
JNORM_INLINE D load(const double* p) { return read_as<D>(p); }
JNORM_INLINE F load(const bf16* p) {
#if defined(__AVX512F__)
  return bits<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#else
  return bits<F>(__builtin_convertvector(read_as<H>(p), FU) << 16);
#endif
}
JNORM_INLINE F load(const f16* p) {
#if defined(__AVX512F__)
  return bits<F>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  F v;
  __m256 halves[2] = {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  memcpy(&v, halves, sizeof v);
  return v;
#else
  const FU h = __builtin_convertvector(read_as<H>(p), FU);
  const FU sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  const FU normal = ((exponent + 112u) << 23) | (mantissa << 13);
  const FU special = 0x7f800000u | (mantissa << 13);
  // A subnormal number is its mantissa times 2^-24; not made as a subnormal float, which the processor may be told to read as 0.
  const FU tiny = bits<FU>(__builtin_convertvector(bits<FI>(mantissa), F) * 0x1p-24f);
  const FI none = exponent == 0u, top = exponent == 31u;
  return bits<F>((none ? tiny : top ? special : normal) | sign);
#endif
}

JNORM_INLINE void store(float* p, F v) { memcpy(p, &v, sizeof v); }
JNORM_INLINE void store(double* p, D v) { memcpy(p, &v, sizeof v); }
JNORM_INLINE H to_bf16(F v) {
#if defined(__AVX512BF16__)
  return bits<H>(_mm512_cvtneps_pbh(bits<__m512>(v)));
#else
  const FU u = bits<FU>(v);
  // To nearest, ties to even; a NaN stays one.
  const FU rounded = (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;
  const FI nan = v != v;
  const FU chosen = nan ? ((u >> 16) | 0x40u) : rounded;
#if defined(__AVX512F__)
  return bits<H>(_mm512_cvtepi32_epi16(bits<__m512i>(chosen)));
#else
  return __builtin_convertvector(chosen, H);
#endif
#endif
}
JNORM_INLINE H to_f16(F v) {
#if defined(__AVX512F__)
  return bits<H>(_mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  __m256 in[2];
  memcpy(in, &v, sizeof v);
  __m128i out[2] = {_mm256_cvtps_ph(in[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                    _mm256_cvtps_ph(in[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  H h;
  memcpy(&h, out, sizeof h);
  return h;
#else
  const FU u = bits<FU>(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const F absolute = bits<F>(magnitude);
  const FU rebased = magnitude - (112u << 23);
  const FU normal = (rebased + (0xfffu + ((rebased >> 13) & 1u))) >> 13;
  // Below 2^-14: in units of 2^-24, rounded by the addition.
  const FU tiny = bits<FU>(absolute * 0x1p24f + 8388608.0f) - 0x4b000000u;
  const FI is_tiny = absolute < 0x1p-14f, over = absolute >= 65520.0f, nan = v != v;
  const FU chosen = nan ? FU{} + 0x7e00u : over ? FU{} + 0x7c00u : is_tiny ? tiny : normal;
  return __builtin_convertvector(chosen | sign, H);
#endif
}
JNORM_INLINE void store(bf16* p, F v) {
  const H h = to_bf16(v);
  memcpy(p, &h, sizeof h);
}
JNORM_INLINE void store(f16* p, F v) {
  const H h = to_f16(v);
  memcpy(p, &h, sizeof h);
}

// Past the caches; p is aligned to the size of what is written.
template <class T> JNORM_INLINE void stream_bytes(void* p, T v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), bits<__m512i>(v));
  } else {
    _mm256_stream_si256(static_cast<__m256i*>(p), bits<__m256i>(v));
  }
#elif defined(__AVX__)
  __m256i part[sizeof(T) / 32];
  memcpy(part, &v, sizeof v);
  for (unsigned i = 0; i < sizeof(T) / 32; i++) _mm256_stream_si256(static_cast<__m256i*>(p) + i, part[i]);
#elif defined(__x86_64__)
  __m128i part[sizeof(T) / 16];
  memcpy(part, &v, sizeof v);
  for (unsigned i = 0; i < sizeof(T) / 16; i++) _mm_stream_si128(static_cast<__m128i*>(p) + i, part[i]);
#else
  memcpy(p, &v, sizeof v);
#endif
}
JNORM_INLINE void stream(float* p, F v) { stream_bytes(p, v); }
JNORM_INLINE void stream(double* p, D v) { stream_bytes(p, v); }
JNORM_INLINE void stream(bf16* p, F v) { stream_bytes(p, to_bf16(v)); }
JNORM_INLINE void stream(f16* p, F v) { stream_bytes(p, to_f16(v)); }
JNORM_INLINE void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// What will be read next, while there is still something to compute: the processor's own prefetching ends with each page of 4 KiB. Into the
// second cache, since the first one is full of the row at hand.
JNORM_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Halves are added, in the wider type.
template <class A> JNORM_INLINE Wide<A> sum_of(V<A> v);
template <> JNORM_INLINE double sum_of<float>(F v) {
  typedef float F8 __attribute__((vector_size(32)));
  typedef double D4 __attribute__((vector_size(32)));
  typedef double D2 __attribute__((vector_size(16)));
  const D eight = __builtin_convertvector(F8{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]}, D) +
                  __builtin_convertvector(F8{v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]}, D);
  const D4 four = D4{eight[0], eight[1], eight[2], eight[3]} + D4{eight[4], eight[5], eight[6], eight[7]};
  const D2 two = D2{four[0], four[1]} + D2{four[2], four[3]};
  return two[0] + two[1];
}
template <> JNORM_INLINE long double sum_of<double>(D v) {
  long double lane[8];
  for (int i = 0; i < 8; i++) lane[i] = v[i];
  for (int n = 4; n > 0; n /= 2)
    for (int i = 0; i < n; i++) lane[i] += lane[i + n];
  return lane[0];
}

// n elements of any storage type to the arithmetic's, zeros up to `to`, and back.
template <class A, class S> JNORM_INLINE void widen_from(A* to, const S* from, int64_t n) {
  constexpr int64_t N = Traits<A>::N;
  int64_t i = 0;
  for (; i + N <= n; i += N) store(to + i, load(from + i));
  if (i < n) {
    S rest[N] = {};
    for (int64_t k = 0; k < n - i; k++) rest[k] = from[i + k];
    A wide[N];
    store(wide, load(rest));
    for (int64_t k = 0; k < n - i; k++) to[i + k] = wide[k];
  }
}
template <class A, class S> JNORM_INLINE void narrow_to(S* to, const A* from, int64_t n) {
  constexpr int64_t N = Traits<A>::N;
  int64_t i = 0;
  for (; i + N <= n; i += N) store(to + i, load(from + i));
  if (i < n) {
    A wide[N] = {};
    for (int64_t k = 0; k < n - i; k++) wide[k] = from[i + k];
    S rest[N];
    store(rest, load(wide));
    for (int64_t k = 0; k < n - i; k++) to[i + k] = rest[k];
  }
}
template <class A> inline void widen(A* to, Array from, int64_t at, int64_t n, int64_t filled) {
  if constexpr (sizeof(A) == 8) {
    widen_from(to, static_cast<const double*>(from.at(at)), n);
  } else if (from.type == Type::f32) {
    widen_from(to, static_cast<const float*>(from.at(at)), n);
  } else if (from.type == Type::bf16) {
    widen_from(to, static_cast<const bf16*>(from.at(at)), n);
  } else {
    widen_from(to, static_cast<const f16*>(from.at(at)), n);
  }
  for (int64_t i = n; i < filled; i++) to[i] = 0;
}
template <class A> inline void narrow(Array to, int64_t at, const A* from, int64_t n) {
  if constexpr (sizeof(A) == 8) {
    narrow_to(static_cast<double*>(to.at(at)), from, n);
  } else if (to.type == Type::f32) {
    narrow_to(static_cast<float*>(to.at(at)), from, n);
  } else if (to.type == Type::bf16) {
    narrow_to(static_cast<bf16*>(to.at(at)), from, n);
  } else {
    narrow_to(static_cast<f16*>(to.at(at)), from, n);
  }
}

}  // namespace JNORM_ISA
}  // namespace jnorm

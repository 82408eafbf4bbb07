// Rows of one chunk: a row is read from memory once, and stays in the nearest cache for what else it takes.
#pragma once

#include "vec.h"

namespace jnorm {
namespace JNORM_ISA {

// Long rows whose derivative is taken together, so that the sums for scale and bias are loaded and stored once for all of them.
constexpr int kTogether = 4;
// The nearest cache of the smaller processors.
constexpr int64_t kNearCacheBytes = 32 << 10;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t row_number(const Row& row, int64_t i, int64_t g) { return ((i / row.inner) * row.G + g) * row.inner + i % row.inner; }

// What an element under the mask is: one that counts, one that only goes through the map, or one that is not finite and read as the mean.
template <class A> struct Kind {
  static constexpr A counted = 1, mapped = 0, unusable = 2;
};

// The kinds of a row's elements, and x with 0 for the unusable ones; returns how many count.
template <class A> Wide<A> spread_row_mask(const Row& row, int64_t o, A* x, A* mask, int64_t filled) {
  const uint8_t* m = row.mask.data + o * row.mask.o;
  Wide<A> n = 0;
  for (int64_t i = 0; i < row.R; i++) {
    const bool counts = m[i * row.mask.r] != 0, finite = x[i] - x[i] == 0;
    mask[i] = counts ? Kind<A>::counted : finite ? Kind<A>::mapped : Kind<A>::unusable;
    x[i] = counts || finite ? x[i] : 0;
    n += counts;
  }
  for (int64_t i = row.R; i < filled; i++) mask[i] = Kind<A>::unusable;
  return n;
}

template <class A> struct Scratch {
  int64_t n;
  A* base;
  Scratch(const Row& row, void* p) : n(padded(row.R, Traits<A>::N)), base(static_cast<A*>(p)) {}
  // Not a multiple of 4 KiB apart, which would look like one address to the processor's check of loads against earlier stores.
  A* at(int i) const { return base + i * (n + 3 * Traits<A>::N); }
};

// Scale or bias with room for whole vectors.
template <class A> const A* whole_vectors(const void* p, const Row& row, int64_t g, A* to) {
  const A* from = static_cast<const A*>(p) + g * row.R;
  if (row.R % Traits<A>::N == 0) return from;
  widen_from(to, from, row.R);
  for (int64_t i = row.R; i < padded(row.R, Traits<A>::N); i++) to[i] = 0;
  return to;
}

}  // namespace JNORM_ISA
}  // namespace jnorm

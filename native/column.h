// Rows and columns of one chunk. In the inner loops a row is a period: as many rows of x as make whole vectors; each of its elements is a
// column of its own until the end. Rows are taken one after the other, as they lie in memory: two at once would spare loads of what belongs
// to the columns, but memory is then read at little more than half its speed.
#pragma once

#include "act.h"

namespace jnorm {
namespace JNORM_ISA {

// Elements of one row that go through scratch memory at a time, where x's type is converted there or a mask is spread.
constexpr int64_t kSegment = 1024;
constexpr int kStaged = 6;

// Where vectors start in a row of n elements: the last one overlaps the one before it where n is no multiple. What is written twice is the
// same; sums keep a place for each vector.
template <class A> JNORM_INLINE int64_t start(int64_t vector, int64_t n) {
  constexpr int64_t N = Traits<A>::N;
  return vector * N + N <= n ? vector * N : n - N;
}
template <class A> JNORM_INLINE int64_t vectors(int64_t n) { return (n + Traits<A>::N - 1) / Traits<A>::N; }
// The place of a column's sum.
template <class A> JNORM_INLINE int64_t place(int64_t column, int64_t n) {
  constexpr int64_t N = Traits<A>::N;
  const int64_t v = column / N;
  return v * N + column - start<A>(v, n);
}

// What is the same for every function over rows: n_rows of `length` elements, `stride` apart.
struct Rows {
  int64_t n, stride, length;
};

// A chunk's rows as periods, and what is left over.
struct Shape {
  int64_t in_period, whole, stride, left;
  explicit Shape(const ColumnChunk& c)
      : in_period(c.period / c.C), whole(c.rows / in_period), stride(in_period > 1 ? c.period : c.stride), left((c.rows % in_period) * c.C) {}
};

// One row's mask as 0 and 1, n elements from the period's element `at` on; the rest up to `filled` does not count.
template <class A> void spread_mask(const ColumnChunk& c, int64_t row, int64_t at, int64_t n, int64_t filled, A* mask) {
  const int64_t rows_in_period = c.period / c.C;
  for (int64_t i = 0; i < n;) {
    const int64_t r = row * rows_in_period + (at + i) / c.C, from = (at + i) % c.C;
    const int64_t length = n - i < c.C - from ? n - i : c.C - from;
    const uint8_t* m = c.mask.data + r * c.mask.r + from * c.mask.c;
    if (c.mask.c == 1) {
      for (int64_t k = 0; k < length; k++) mask[i + k] = m[k] ? 1 : 0;
    } else {
      const A value = *m ? 1 : 0;
      for (int64_t k = 0; k < length; k++) mask[i + k] = value;
    }
    i += length;
  }
  for (int64_t i = n; i < filled; i++) mask[i] = 0;
}

// One vector's worth of z, but for a residual, and xc.
template <class A, Act act, bool M> struct Point {
  V<A> z, xc;
  I<A> usable, counted;
  JNORM_INLINE Point(V<A> x, V<A> center, V<A> offset, V<A> shift, V<A> mul, V<A> add, const A* mask, Act any) {
    if constexpr (M) {
      counted = load(mask) != 0;
      usable = counted | ((x - x) == 0);
    }
    if constexpr (act == kOutput) {
      z = inverted<A>(x, any);
      xc = (z - add) * center + (shift - offset);
    } else {
      const V<A> near = x - center;
      V<A> inner = near - shift;
      if constexpr (M) inner = usable ? inner : offset - shift;
      z = inner * mul + add;
      xc = near - offset;
    }
    if constexpr (M) xc = usable ? xc : V<A>{};
  }
};

}  // namespace JNORM_ISA
}  // namespace jnorm

// Moments of a chunk's columns.
#include "column.h"

namespace jnorm {
namespace JNORM_ISA {
namespace {

// Deviations are taken from the mean of the first rows of a block, whose distance from the block's mean is bounded by what the variance
// itself has of it: with n rows and k first ones, n·distance² <= m2·(n - k) / k. So one pass over x loses at most a factor n/k of accuracy.
constexpr int64_t kFirstRows = 8;

// bfloat16 by pairs: the two halves of a 32-bit word are two columns, each one instruction away from its float. A vector's even columns come
// first, then its odd ones; only where the row is a multiple of two vectors.
inline bool pairs(Type x, int64_t n) { return x == Type::bf16 && n % 32 == 0; }
inline int64_t place_of_pairs(int64_t column) { return column / 32 * 32 + column % 2 * 16 + column % 32 / 2; }

JNORM_INLINE void pairs_row(const bf16* x, const Rows& rows, const float* shift, float* first, float* second) {
  for (int64_t j = 0; j < rows.length; j += 32) {
    const FU words = read_as<FU>(x + j);
    const F halves[2] = {bits<F>(words << 16), bits<F>(words & 0xffff0000u)};
    for (int k = 0; k < 2; k++) {
      const int64_t at = j + 16 * k;
      const F d = halves[k] - load(shift + at);
      store(first + at, load(first + at) + d);
      if (second) store(second + at, load(second + at) + d * d);
    }
  }
}

template <class A, class S> JNORM_INLINE void deviations_row(const S* x, const Rows& rows, const A* shift, A* first, A* second) {
  if constexpr (sizeof(S) == 2) {
    if (pairs(Type::bf16, rows.length)) return pairs_row(x, rows, shift, first, second);
  }
  for (int64_t v = 0; v < vectors<A>(rows.length); v++) {
    const int64_t j = start<A>(v, rows.length), k = v * Traits<A>::N;
    const V<A> d = load(x + j) - load(shift + k);
    store(first + k, load(first + k) + d);
    if (second) store(second + k, load(second + k) + d * d);
  }
}

template <class A, class S> void deviations(const S* x, const Rows rows, const A* shift, A* first, A* second) {
  for (int64_t r = 0; r < rows.n; r++) deviations_row<A, S>(x + r * rows.stride, rows, shift, first, second);
}

template <class A> struct Moments {
  A *shift, *first, *second, *counted;
  Wide<A> *count, *mean, *m2;
  Wide<A> merged = 0;
  int64_t n;
  explicit Moments(const ColumnChunk& c) : n(padded(c.period, Traits<A>::N)) {
    shift = static_cast<A*>(c.scratch) + kStaged * kSegment;
    first = shift + n, second = first + n, counted = second + n;
    count = reinterpret_cast<Wide<A>*>(counted + n);
    mean = count + n, m2 = mean + n;
    for (int64_t i = 0; i < n; i++) count[i] = mean[i] = m2[i] = 0;
  }
  void clear(A* p) {
    for (int64_t i = 0; i < n; i++) p[i] = 0;
  }
  // Merge a block of `more` elements of every column (Chan).
  void merge(Wide<A> more) {
    const Wide<A> before = merged, ratio = more / (before + more), product = before * ratio, each = 1 / more;
    for (int64_t i = 0; i < n; i++) {
      const Wide<A> from = Wide<A>(first[i]) * each, m = shift[i] + from, square = second[i] - from * first[i];
      const Wide<A> delta = m - mean[i];
      mean[i] = before == 0 ? m : mean[i] + delta * ratio;
      m2[i] += (square < 0 ? 0 : square) + delta * delta * product;
    }
    merged += more;
  }
  // Every column has the same count while whole blocks are merged.
  void fill_count() {
    for (int64_t i = 0; i < n; i++) count[i] = merged;
  }
  void merge_one(int64_t i, Wide<A> more, Wide<A> m, Wide<A> square) {
    if (more == 0) return;
    const Wide<A> all = count[i] + more, delta = m - mean[i];
    mean[i] = count[i] == 0 ? m : mean[i] + delta * (more / all);
    m2[i] += square + delta * delta * (count[i] * (more / all));
    count[i] = all;
  }
};

template <class A, class S> void moments_plain(const ColumnChunk& c, Moments<A>& to, const Shape& s) {
  for (int64_t row = 0; row < s.whole; row += kBlockRows) {
    const int64_t rows = s.whole - row < kBlockRows ? s.whole - row : kBlockRows, few = rows < kFirstRows ? rows : kFirstRows;
    const S* x = static_cast<const S*>(c.x.data) + row * s.stride;
    to.clear(to.shift), to.clear(to.first), to.clear(to.second);
    deviations<A, S>(x, {few, s.stride, c.period}, to.shift, to.first, nullptr);
    for (int64_t i = 0; i < to.n; i++) to.shift[i] = to.first[i] * (A(1) / A(few));
    to.clear(to.first);
    deviations<A, S>(x, {rows, s.stride, c.period}, to.shift, to.first, to.second);
    to.merge(rows);
  }
  to.fill_count();
}

// With a mask, or where x is converted first: the exact two passes over blocks of rows.
template <class A> void moments_staged(const ColumnChunk& c, Moments<A>& to, int64_t row, int64_t rows, int64_t length) {
  const Shape s(c);
  A* const x = static_cast<A*>(c.scratch);
  A* const mask = x + kSegment;
  to.clear(to.shift), to.clear(to.first), to.clear(to.second), to.clear(to.counted);
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t r = row; r < row + rows; r++) {
      for (int64_t j = 0; j < length; j += kSegment) {
        const int64_t n = length - j < kSegment ? length - j : kSegment;
        widen(x, c.x, r * s.stride + j, n, n);
        if (c.mask.data) spread_mask(c, r, j, n, n, mask);
        A *const shift = to.shift + j, *const first = to.first + j, *const second = to.second + j, *const counted = to.counted + j;
        for (int64_t i = 0; i < n; i++) {
          const bool counts = !c.mask.data || mask[i] != 0;
          const A d = counts ? x[i] - shift[i] : 0;
          first[i] += d;
          second[i] += d * d;
          if (pass == 0) counted[i] += counts ? 1 : 0;
        }
      }
    }
    if (pass == 0) {
      for (int64_t i = 0; i < to.n; i++) to.shift[i] = to.first[i] / (to.counted[i] > 1 ? to.counted[i] : A(1));
      to.clear(to.first), to.clear(to.second);
    }
  }
  for (int64_t i = 0; i < c.period; i++) {
    const Wide<A> more = to.counted[i] > 1 ? to.counted[i] : 1, from = to.first[i] / more, square = to.second[i] - from * to.first[i];
    to.merge_one(i, to.counted[i], to.shift[i] + from, square < 0 ? 0 : square);
  }
}

template <class A> void moments(const ColumnChunk& c, const Partial& out) {
  Moments<A> to(c);
  const Shape s(c);
  const bool staged = c.mask.data || c.x.type == Type::f16, by_pairs = pairs(c.x.type, c.period);
  auto own = [&](int64_t column) { return staged ? column : by_pairs ? place_of_pairs(column) : place<A>(column, c.period); };
  if (staged) {
    for (int64_t row = 0; row < s.whole; row += kBlockRows) {
      moments_staged<A>(c, to, row, s.whole - row < kBlockRows ? s.whole - row : kBlockRows, c.period);
    }
  } else if constexpr (sizeof(A) == 8) {
    moments_plain<A, double>(c, to, s);
  } else if (c.x.type == Type::f32) {
    moments_plain<A, float>(c, to, s);
  } else {
    moments_plain<A, bf16>(c, to, s);
  }
  if (s.left && staged) moments_staged<A>(c, to, s.whole, 1, s.left);
  if (s.left && !staged) {
    // A last row that is shorter.
    A* const x = static_cast<A*>(c.scratch);
    for (int64_t j = 0; j < s.left; j += kSegment) {
      const int64_t n = s.left - j < kSegment ? s.left - j : kSegment;
      widen(x, c.x, s.whole * s.stride + j, n, n);
      for (int64_t i = 0; i < n; i++) to.merge_one(own(j + i), 1, x[i], 0);
    }
  }
  auto *const count = static_cast<Wide<A>*>(out.count), *const mean = static_cast<Wide<A>*>(out.mean), *const m2 = static_cast<Wide<A>*>(out.m2);
  for (int64_t column = 0; column < c.C; column++) {
    const int64_t i = own(column);
    for (int64_t j = column + c.C; j < c.period; j += c.C) to.merge_one(i, to.count[own(j)], to.mean[own(j)], to.m2[own(j)]);
    count[column] = to.count[i], mean[column] = to.mean[i], m2[column] = to.m2[i];
  }
}

}  // namespace

void moments_of(const ColumnChunk& c, const Partial& out) { is_double(c.x.type) ? moments<double>(c, out) : moments<float>(c, out); }

}  // namespace JNORM_ISA
}  // namespace jnorm

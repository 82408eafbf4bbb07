// Column kernels over one chunk. In the inner loops a row is a period: as many rows of x as make whole vectors; each of its elements is a
// column of its own until the end. Rows are taken one after the other, as they lie in memory: two at once would spare loads of what belongs
// to the columns, but memory is then read at little more than half its speed.
#include "vec.h"

namespace jnorm {
namespace JNORM_ISA {
namespace {

// Elements of one row that go through scratch memory at a time, where x's type is converted there or a mask is spread.
constexpr int64_t kSegment = 1024;
constexpr int kStaged = 6;

template <class A> struct Period {
  const A *center, *offset, *shift, *mul, *add, *a, *b;
  explicit Period(const ColumnChunk& c, int64_t at = 0)
      : center(pick(c.center, at)), offset(pick(c.offset, at)), shift(pick(c.shift, at)), mul(pick(c.mul, at)), add(pick(c.add, at)),
        a(pick(c.a, at)), b(pick(c.b, at)) {}
  static const A* pick(const void* p, int64_t at) { return p ? static_cast<const A*>(p) + at : nullptr; }
};

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

template <class A, class S> struct Streams {
  const S* x;
  const S* residual;  // of x's type, or there is none
  const A* mask;      // 1 where an element counts
};

// One vector's worth of z and xc.
template <class A, bool M> struct Point {
  V<A> inner, xc;
  I<A> usable, counted;
  JNORM_INLINE Point(V<A> x, V<A> center, V<A> offset, V<A> shift, const A* mask) {
    const V<A> near = x - center;
    inner = near - shift;
    xc = near - offset;
    if constexpr (M) {
      counted = load(mask) != 0;
      usable = counted | ((x - x) == 0);
      inner = usable ? inner : offset - shift;
      xc = usable ? xc : V<A>{};
    }
  }
};

template <class A, class S, class Y, Act act, bool R, bool M>
JNORM_INLINE void apply_row(const Period<A>& p, const Streams<A, S>& in, Y* y, const Rows& rows, bool streamed, Act any) {
  for (int64_t v = 0; v < vectors<A>(rows.length); v++) {
    const int64_t j = start<A>(v, rows.length);
    const V<A> center = load(p.center + j), shift = load(p.shift + j), mul = load(p.mul + j), add = load(p.add + j);
    const V<A> offset = M ? load(p.offset + j) : V<A>{};
    const Point<A, M> point(load(in.x + j), center, offset, shift, M ? in.mask + j : nullptr);
    V<A> z = point.inner * mul + add;
    if constexpr (R) z += load(in.residual + j);
    if (streamed) {
      stream(y + j, activate<act, A>(z, any));
    } else {
      store(y + j, activate<act, A>(z, any));
    }
  }
}

template <class A, class S, class Y, Act act, bool R, bool M>
JNORM_INLINE void sums_row(const Period<A>& p, const Streams<A, S>& in, const Y* dy, const Rows& rows, A* first, A* second, Act any) {
  for (int64_t v = 0; v < vectors<A>(rows.length); v++) {
    const int64_t j = start<A>(v, rows.length);
    const V<A> center = load(p.center + j), offset = load(p.offset + j);
    V<A> shift = offset, mul{}, add{};
    if constexpr (act != Act::none) shift = load(p.shift + j), mul = load(p.mul + j), add = load(p.add + j);
    const Point<A, M> point(load(in.x + j), center, offset, shift, M ? in.mask + j : nullptr);
    V<A> z = point.inner * mul + add;
    if constexpr (R) z += load(in.residual + j);
    const V<A> g = times_slope<act, A>(z, load(dy + j), any);
    const int64_t k = v * Traits<A>::N;
    store(first + k, load(first + k) + g);
    store(second + k, load(second + k) + g * point.xc);
  }
}

template <class A, class S, class Y, Act act, bool R, bool M>
JNORM_INLINE void cotangent_row(const Period<A>& p, const Streams<A, S>& in, const Y* dy, S* dx, S* dresidual, const Rows& rows,
                                  bool streamed, Act any) {
  for (int64_t v = 0; v < vectors<A>(rows.length); v++) {
    const int64_t j = start<A>(v, rows.length);
    const V<A> center = load(p.center + j), offset = load(p.offset + j), mul = load(p.mul + j), a = load(p.a + j), b = load(p.b + j);
    V<A> shift = offset, add{};
    if constexpr (act != Act::none) shift = load(p.shift + j), add = load(p.add + j);
    const Point<A, M> point(load(in.x + j), center, offset, shift, M ? in.mask + j : nullptr);
    V<A> z = point.inner * mul + add;
    if constexpr (R) z += load(in.residual + j);
    const V<A> g = times_slope<act, A>(z, load(dy + j), any);
    V<A> through = mul * g, statistics = a + b * point.xc;
    if constexpr (M) {
      through = point.usable ? through : V<A>{};
      statistics = point.counted ? statistics : V<A>{};
    }
    if (streamed) {
      stream(dx + j, through + statistics);
      if constexpr (R) stream(dresidual + j, g);
    } else {
      store(dx + j, through + statistics);
      if constexpr (R) store(dresidual + j, g);
    }
  }
}

// --- all rows; what is passed by value stays in registers, as what is written cannot change it there ---------------------------------

template <class A, class S> Streams<A, S> moved(Streams<A, S> in, int64_t by) {
  return {in.x + by, in.residual ? in.residual + by : nullptr, in.mask ? in.mask + by : nullptr};
}

// Which types are computed on as they lie; all others are converted in scratch memory first.
enum class Pair { f32, f64, bf16, bf16_f32, other };

inline Pair pair_of(Type x, Type y) {
  if (x == Type::f64) return Pair::f64;
  if (x == Type::f32 && y == Type::f32) return Pair::f32;
  if (x == Type::bf16 && y == Type::bf16) return Pair::bf16;
  if (x == Type::bf16 && y == Type::f32) return Pair::bf16_f32;
  return Pair::other;
}

struct Apply {
  template <class A, class S, class Y, Act act, bool R, bool M>
  static void rows(const ColumnChunk& c, const Period<A> p, Streams<A, S> in, Y* y, S*, S*, Rows rows, A*, A*) {
    const bool streamed = c.stream && !M;
    const Act any = c.act;
    for (int64_t r = 0; r < rows.n; r++) {
      const int64_t at = r * rows.stride;
      apply_row<A, S, Y, act, R, M>(p, moved(in, at), y + at, rows, streamed, any);
    }
  }
};

struct Sums {
  template <class A, class S, class Y, Act act, bool R, bool M>
  static void rows(const ColumnChunk& c, const Period<A> p, Streams<A, S> in, Y* dy, S*, S*, Rows rows, A* first, A* second) {
    const Act any = c.act;
    for (int64_t r = 0; r < rows.n; r++) {
      const int64_t at = r * rows.stride;
      sums_row<A, S, Y, act, R, M>(p, moved(in, at), dy + at, rows, first, second, any);
    }
  }
};

struct Cotangent {
  template <class A, class S, class Y, Act act, bool R, bool M>
  static void rows(const ColumnChunk& c, const Period<A> p, Streams<A, S> in, Y* dy, S* dx, S* dresidual, Rows rows, A*, A*) {
    const bool streamed = c.stream && !M;
    const Act any = c.act;
    for (int64_t r = 0; r < rows.n; r++) {
      const int64_t at = r * rows.stride;
      cotangent_row<A, S, Y, act, R, M>(p, moved(in, at), dy + at, dx + at, R ? dresidual + at : nullptr, rows, streamed, any);
    }
  }
};

// --- from what is known when it runs to what is known when it is compiled -----------------------------------------------------------

// Everything is compiled for an activation that is known only when it runs; for one known before where that is worth the compiler's time.
template <class Op, class A, class S, class Y, bool R, bool M>
void run_act(const ColumnChunk& c, const Period<A>& p, Streams<A, S> in, Y* y, S* dx, S* dr, Rows rows, A* first, A* second) {
  constexpr bool is_float = sizeof(A) == 4, common = is_float && !M, alike = sizeof(S) == sizeof(Y);
  if constexpr (!M && !R) {
    if (c.act == Act::none) return Op::template rows<A, S, Y, Act::none, R, M>(c, p, in, y, dx, dr, rows, first, second);
  }
  if constexpr (common && (alike || !R)) {
    if (c.act == Act::relu) return Op::template rows<A, S, Y, Act::relu, R, M>(c, p, in, y, dx, dr, rows, first, second);
  }
  if constexpr (common && alike && !R) {
    if (c.act == Act::silu) return Op::template rows<A, S, Y, Act::silu, R, M>(c, p, in, y, dx, dr, rows, first, second);
    if (c.act == Act::gelu) return Op::template rows<A, S, Y, Act::gelu, R, M>(c, p, in, y, dx, dr, rows, first, second);
  }
  Op::template rows<A, S, Y, kAnyAct, R, M>(c, p, in, y, dx, dr, rows, first, second);
}

template <class Op, class A, class S, class Y>
void run_direct(const ColumnChunk& c, int64_t at, Rows rows, A* first, A* second) {
  const Period<A> p(c);
  const Streams<A, S> in{static_cast<const S*>(c.x.data) + at, static_cast<const S*>(c.residual.data), nullptr};
  Y* y = static_cast<Y*>(c.y.data ? c.y.data : c.dy.data) + at;
  S* dx = c.dx ? static_cast<S*>(c.dx.data) + at : nullptr;
  if (c.residual) {
    S* dr = c.dresidual ? static_cast<S*>(c.dresidual.data) + at : nullptr;
    run_act<Op, A, S, Y, true, false>(c, p, {in.x, in.residual + at, nullptr}, y, dx, dr, rows, first, second);
  } else {
    run_act<Op, A, S, Y, false, false>(c, p, in, y, dx, nullptr, rows, first, second);
  }
}

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

// The next elements of a row of which some are left: never so many that less than a vector remains.
template <class A> int64_t segment(int64_t left) {
  if (left <= kSegment) return left;
  return left - kSegment < Traits<A>::N ? kSegment - Traits<A>::N : kSegment;
}

// The rows from `row` on that have `length` elements each, segment by segment in scratch memory.
template <class Op, class A> void run_staged(const ColumnChunk& c, int64_t row, Rows rows, A* first, A* second) {
  constexpr int64_t N = Traits<A>::N;
  A* const x = static_cast<A*>(c.scratch);
  A *const residual = x + kSegment, *const y = residual + kSegment, *const mask = y + kSegment, *const dx = mask + kSegment,
          *const dr = dx + kSegment;
  ColumnChunk here = c;
  here.stream = false;
  for (int64_t r = 0; r < rows.n; r++) {
    for (int64_t j = 0, n; j < rows.length; j += n) {
      n = segment<A>(rows.length - j);
      const int64_t at = (row + r) * rows.stride + j;
      // Whole vectors: beyond n everything is 0, and 0 is added to the sums. The period has room for that where it is longer than the row;
      // else the last vector overlaps.
      const int64_t room = c.period - j < kSegment ? c.period - j : kSegment;
      const int64_t filled = n < N ? N : padded(n, N) <= room ? padded(n, N) : n;
      widen(x, c.x, at, n, filled);
      if (c.residual) widen(residual, c.residual, at, n, filled);
      if (c.dy) widen(y, c.dy, at, n, filled);
      const Streams<A, A> in{x, residual, mask};
      const Period<A> p(c, j);
      const Rows one{1, filled, filled};
      A *const f = first ? first + j : nullptr, *const s = second ? second + j : nullptr;
      if (c.mask.data) {
        spread_mask(c, row + r, j, n, filled, mask);
        if (c.residual) run_act<Op, A, A, A, true, true>(here, p, in, y, dx, dr, one, f, s);
        else run_act<Op, A, A, A, false, true>(here, p, in, y, dx, dr, one, f, s);
      } else {
        if (c.residual) run_act<Op, A, A, A, true, false>(here, p, in, y, dx, dr, one, f, s);
        else run_act<Op, A, A, A, false, false>(here, p, in, y, dx, dr, one, f, s);
      }
      if (c.y) narrow(c.y, at, y, n);
      if (c.dx) narrow(c.dx, at, dx, n);
      if (c.dresidual) narrow(c.dresidual, at, dr, n);
    }
  }
}

// `rows` whole periods from number `row` on.
template <class Op, class A> void run_rows(const ColumnChunk& c, int64_t row, Rows rows, A* first, A* second) {
  const bool same_residual = !c.residual || (c.residual.type == c.x.type && (!c.dx || c.dresidual.type == c.x.type));
  const Pair pair = pair_of(c.x.type, c.y ? c.y.type : c.dy.type);
  if (c.mask.data || !same_residual || pair == Pair::other) return run_staged<Op, A>(c, row, rows, first, second);
  const int64_t at = row * rows.stride;
  if constexpr (sizeof(A) == 8) {
    run_direct<Op, A, double, double>(c, at, rows, first, second);
  } else {
    switch (pair) {
      case Pair::f32: return run_direct<Op, A, float, float>(c, at, rows, first, second);
      case Pair::bf16: return run_direct<Op, A, bf16, bf16>(c, at, rows, first, second);
      case Pair::bf16_f32: return run_direct<Op, A, bf16, float>(c, at, rows, first, second);
      default: return;
    }
  }
}

// A chunk's rows as periods, and what is left over.
struct Shape {
  int64_t in_period, whole, stride, left;
  explicit Shape(const ColumnChunk& c)
      : in_period(c.period / c.C), whole(c.rows / in_period), stride(in_period > 1 ? c.period : c.stride), left((c.rows % in_period) * c.C) {}
};

template <class Op, class A> void elementwise(const ColumnChunk& c) {
  const Shape s(c);
  run_rows<Op, A>(c, 0, {s.whole, s.stride, c.period}, nullptr, nullptr);
  if (s.left) run_staged<Op, A>(c, s.whole, {1, s.stride, s.left}, nullptr, nullptr);
  if (c.stream) end_of_stream();
}

template <class A> void sums(const ColumnChunk& c, const Partial& out) {
  const Shape s(c);
  const int64_t n = padded(c.period, Traits<A>::N);
  A* const first = static_cast<A*>(c.scratch) + kStaged * kSegment;
  A* const second = first + n;
  auto* const wide_first = reinterpret_cast<Wide<A>*>(second + n);
  auto* const wide_second = wide_first + n;
  for (int64_t i = 0; i < n; i++) wide_first[i] = wide_second[i] = 0;
  auto block = [&](int64_t row, int64_t rows, int64_t length) {
    for (int64_t i = 0; i < n; i++) first[i] = second[i] = 0;
    if (length == c.period) {
      run_rows<Sums, A>(c, row, {rows, s.stride, length}, first, second);
    } else {
      run_staged<Sums, A>(c, row, {rows, s.stride, length}, first, second);
    }
    for (int64_t i = 0; i < n; i++) wide_first[i] += first[i], wide_second[i] += second[i];
  };
  for (int64_t row = 0; row < s.whole; row += kBlockRows) {
    block(row, s.whole - row < kBlockRows ? s.whole - row : kBlockRows, c.period);
  }
  if (s.left) block(s.whole, 1, s.left);
  auto* const to_first = static_cast<Wide<A>*>(out.mean);
  auto* const to_second = static_cast<Wide<A>*>(out.m2);
  for (int64_t column = 0; column < c.C; column++) {
    Wide<A> one = 0, two = 0;
    for (int64_t j = column; j < c.period; j += c.C) one += wide_first[place<A>(j, c.period)], two += wide_second[place<A>(j, c.period)];
    to_first[column] = one;
    to_second[column] = two;
  }
}

// --- moments ------------------------------------------------------------------------------------------------------------------------

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
void apply_to(const ColumnChunk& c) { is_double(c.x.type) ? elementwise<Apply, double>(c) : elementwise<Apply, float>(c); }
void cotangent_sums_of(const ColumnChunk& c, const Partial& out) { is_double(c.x.type) ? sums<double>(c, out) : sums<float>(c, out); }
void cotangent_apply_to(const ColumnChunk& c) { is_double(c.x.type) ? elementwise<Cotangent, double>(c) : elementwise<Cotangent, float>(c); }

}  // namespace JNORM_ISA
}  // namespace jnorm

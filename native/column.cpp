// What is done with a column's statistics: y, the sums of the backward pass, dx.
#include <type_traits>

#include "column.h"

namespace jnorm {
namespace JNORM_ISA {
namespace {

template <class A> struct Period {
  const A *center, *offset, *shift, *mul, *add, *a, *b;
  explicit Period(const ColumnChunk& c, int64_t at = 0)
      : center(pick(c.center, at)), offset(pick(c.offset, at)), shift(pick(c.shift, at)), mul(pick(c.mul, at)), add(pick(c.add, at)),
        a(pick(c.a, at)), b(pick(c.b, at)) {}
  static const A* pick(const void* p, int64_t at) { return p ? static_cast<const A*>(p) + at : nullptr; }
};

template <class A, class S> struct Streams {
  const S* x;
  const S* residual;  // of x's type, or there is none
  const A* mask;      // 1 where an element counts
};

template <class A, class S, class Y, Act act, bool R, bool M>
JNORM_INLINE void apply_row(const Period<A>& p, const Streams<A, S>& in, Y* y, const Rows& rows, bool streamed, Act any) {
  for (int64_t v = 0; v < vectors<A>(rows.length); v++) {
    const int64_t j = start<A>(v, rows.length);
    const V<A> center = load(p.center + j), shift = load(p.shift + j), mul = load(p.mul + j), add = load(p.add + j);
    const V<A> offset = M ? load(p.offset + j) : V<A>{};
    const Point<A, act, M> point(load(in.x + j), center, offset, shift, mul, add, M ? in.mask + j : nullptr, any);
    V<A> z = point.z;
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
    const Point<A, act, M> point(load(in.x + j), center, offset, shift, mul, add, M ? in.mask + j : nullptr, any);
    V<A> z = point.z;
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
    const Point<A, act, M> point(load(in.x + j), center, offset, shift, mul, add, M ? in.mask + j : nullptr, any);
    V<A> z = point.z;
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
  if constexpr (!R && !std::is_same_v<Op, Apply>) {
    if (c.output) return Op::template rows<A, S, Y, kOutput, R, M>(c, p, in, y, dx, dr, rows, first, second);
  }
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

}  // namespace

void apply_to(const ColumnChunk& c) { is_double(c.x.type) ? elementwise<Apply, double>(c) : elementwise<Apply, float>(c); }
void cotangent_sums_of(const ColumnChunk& c, const Partial& out) { is_double(c.x.type) ? sums<double>(c, out) : sums<float>(c, out); }
void cotangent_apply_to(const ColumnChunk& c) { is_double(c.x.type) ? elementwise<Cotangent, double>(c) : elementwise<Cotangent, float>(c); }

}  // namespace JNORM_ISA
}  // namespace jnorm

// Row norms of a chunk.
#include <type_traits>

#include "act.h"
#include "row.h"

namespace jnorm {
namespace JNORM_ISA {
namespace {

template <class A> struct Powers;
template <> struct Powers<float> {
  static constexpr float limit[2] = {0x1p40f, 0x1p80f}, factor[2] = {0x1p-60f, 0x1p-100f}, down = 0x1p-30f;
};
template <> struct Powers<double> {
  static constexpr double limit[2] = {0x1p300, 0x1p700}, factor[2] = {0x1p-500, 0x1p-860}, down = 0x1p-30;
};

template <class A> JNORM_INLINE I<A> lanes_below(int64_t n) {
  I<A> lane{};
  for (int i = 0; i < Traits<A>::N; i++) lane[i] = i;
  return lane < static_cast<decltype(lane[0] + lane[0])>(n);
}

// Of power·x.
template <class A> struct Statistics {
  A power = 1, center = 0, offset = 0, square = 0;
};

// Σ of(x) over the counted elements of a row that lies in memory as whole vectors.
template <class A, bool M, class Of> JNORM_INLINE Wide<A> total(const A* x, const A* mask, int64_t R, Of of) {
  constexpr int64_t N = Traits<A>::N;
  V<A> s0{}, s1{}, s2{}, s3{};
  auto one = [&](int64_t j) {
    const V<A> d = of(load(x + j));
    if constexpr (M) return load(mask + j) == Kind<A>::counted ? d : V<A>{};
    return d;
  };
  int64_t j = 0;
  for (; j + 4 * N <= R; j += 4 * N) s0 += one(j), s1 += one(j + N), s2 += one(j + 2 * N), s3 += one(j + 3 * N);
  for (; j + N <= R; j += N) s0 += one(j);
  if (j < R) s1 += lanes_below<A>(R - j) ? one(j) : V<A>{};
  return sum_of<A>((s0 + s1) + (s2 + s3));
}

// Σ (x - near) and Σ (x - near)² over a row of whole vectors, which `load_at` gives.
template <class A, class Load> JNORM_INLINE void both_totals(int64_t R, A near, Load load_at, Wide<A>* one, Wide<A>* two) {
  constexpr int64_t N = Traits<A>::N;
  V<A> s0{}, s1{}, s2{}, s3{}, q0{}, q1{}, q2{}, q3{};
  auto add = [&](int64_t j, V<A>& s, V<A>& q) {
    const V<A> d = load_at(j) - near;
    s += d;
    q += d * d;
  };
  int64_t j = 0;
  for (; j + 4 * N <= R; j += 4 * N) add(j, s0, q0), add(j + N, s1, q1), add(j + 2 * N, s2, q2), add(j + 3 * N, s3, q3);
  for (; j + N <= R; j += N) add(j, s0, q0);
  *one = sum_of<A>((s0 + s1) + (s2 + s3));
  *two = sum_of<A>((q0 + q1) + (q2 + q3));
}

template <class A> JNORM_INLINE void set_mean(Statistics<A>& s, Wide<A> mean) {
  s.center = A(mean);
  s.offset = A(mean - s.center);
}

template <class A, bool centered, bool M> JNORM_INLINE A mean_square(const A* x, const A* mask, int64_t R, Wide<A> each, const Statistics<A>& s) {
  const A center = s.center, offset = s.offset;
  return A(each * total<A, M>(x, mask, R, [=](V<A> v) {
    const V<A> d = centered ? (v - center) - offset : v;
    return d * d;
  }));
}

// The power of two that brings the deviations of a huge row to a scale whose squares are in range.
template <class A> A power_of(const A* x, const A* mask, int64_t R, A first) {
  A power = 1;
  for (int k = 0; k < 2; k++) {
    for (int64_t i = 0; i < R; i++) {
      const A d = x[i] * Powers<A>::down - first * Powers<A>::down;
      if ((!mask || mask[i] == Kind<A>::counted) && (d < 0 ? -d : d) > Powers<A>::limit[k] * Powers<A>::down) {
        power = Powers<A>::factor[k];
        break;
      }
    }
  }
  return power;
}

template <class A, class Y, Act act, bool centered, bool M>
JNORM_INLINE void write_row(const A* x, const A* mask, const A* scale, const A* bias, int64_t n, const Statistics<A>& s, A rstd, Y* y,
                            bool streamed, Act any, const char* next, int64_t step) {
  const A center = s.center, offset = s.offset;
  for (int64_t j = 0; j < n; j += Traits<A>::N, next += step) {
    prefetch(next);
    const V<A> v = load(x + j);
    V<A> d = centered ? (v - center) - offset : v;
    if constexpr (M) d = load(mask + j) == Kind<A>::unusable ? V<A>{} : d;
    const V<A> out = activate<act, A>(d * rstd * load(scale + j) + load(bias + j), any);
    if (streamed) {
      stream(y + j, out);
    } else {
      store(y + j, out);
    }
  }
}

template <class A, class Y, bool centered, bool M>
void write_row_of(Act act, const A* x, const A* mask, const A* scale, const A* bias, int64_t n, const Statistics<A>& s, A rstd, Y* y,
                  bool streamed, const char* next, int64_t step) {
  act == Act::none ? write_row<A, Y, Act::none, centered, M>(x, mask, scale, bias, n, s, rstd, y, streamed, act, next, step)
                   : write_row<A, Y, kAnyAct, centered, M>(x, mask, scale, bias, n, s, rstd, y, streamed, act, next, step);
}

// One row on its way: strictly one after the other, since memory is then read the fastest.
template <class A> struct Line {
  const A* x;
  int64_t o;
  Wide<A> each;  // 1 / counted elements
  bool nothing;  // is counted
  A first;
  Statistics<A> s;
};

// In two passes: the mean from what is left of x beside `near`, and the squares around the mean.
template <class A, bool centered, bool M> JNORM_INLINE void around(Line<A>& line, const A* mask, int64_t R, A near) {
  if (centered) set_mean<A>(line.s, near + line.each * total<A, M>(line.x, mask, R, [=](V<A> v) { return v - near; }));
  line.s.square = mean_square<A, centered, M>(line.x, mask, R, line.each, line.s);
}

// Around a value near the mean, from which the squares are moved to the mean. Where it turns out to be far, all of it again around that.
template <class A, bool centered, class Load> JNORM_INLINE void in_one_pass(Line<A>& line, int64_t R, Load load_at) {
  const A near = centered ? A(sum_of<A>(load_at(0)) / Traits<A>::N) : A(0);
  Wide<A> one, two;
  both_totals<A>(R, near, load_at, &one, &two);
  if (centered) set_mean<A>(line.s, near + one * line.each);
  const Wide<A> moved = one * one * line.each, left = two - moved;
  if (!centered) {
    line.s.square = A(line.each * two);
  } else if (moved <= left) {
    line.s.square = A(line.each * left);
  } else {
    around<A, centered, false>(line, nullptr, R, line.s.center);
  }
}

template <class A, bool M> class Lines {
 public:
  Lines(const Row& row, const RowChunk& c) : row_(row), c_(c), scratch_(row, c.scratch), R_(row.R) {
    whole_ = R_ > 0 && R_ % Traits<A>::N == 0 && !M;
    direct_ = whole_ && !c.residual && row.x.type == (sizeof(A) == 8 ? Type::f64 : Type::f32);
  }

  A* buffer() const { return scratch_.at(2); }
  A* mask() const { return scratch_.at(3); }

  // The row as the arithmetic's type, in scratch memory unless it is so already, and its statistics.
  template <bool centered> JNORM_INLINE Line<A> read(int64_t i) const {
    Line<A> line{};
    line.o = row_number(row_, i, c_.g);
    line.each = Wide<A>(1) / (R_ ? R_ : 1);
    line.nothing = R_ == 0;
    const int64_t at = line.o * R_;
    line.x = direct_ ? static_cast<const A*>(row_.x.data) + at : buffer();
    // Only where there is a mean to subtract: without one a pass that only widens is the faster, by a third (the reason is not known).
    if constexpr (sizeof(A) == 4 && centered) {
      if (whole_ && !c_.residual) {
        if (row_.x.type == Type::bf16) return widened<centered>(line, static_cast<const bf16*>(row_.x.data) + at, buffer());
        if (row_.x.type == Type::f16) return widened<centered>(line, static_cast<const f16*>(row_.x.data) + at, buffer());
      }
    }
    if (!direct_) widen(buffer(), row_.x, at, R_, scratch_.n);
    if (c_.residual) add_residual(at, buffer(), mask());
    line.first = R_ ? line.x[0] : 0;
    if constexpr (M) count(line);
    const A* const x = line.x;
    whole_ ? in_one_pass<A, centered>(line, R_, [=](int64_t j) { return load(x + j); }) : around<A, centered, M>(line, mask(), R_, line.first);
    return line;
  }

 private:
  template <bool centered, class S> JNORM_INLINE Line<A> widened(Line<A> line, const S* from, A* to) const {
    in_one_pass<A, centered>(line, R_, [=](int64_t j) {
      const V<A> v = load(from + j);
      store(to + j, v);
      return v;
    });
    line.first = to[0];
    return line;
  }
  void add_residual(int64_t at, A* to, A* other) const {
    widen(other, c_.residual, at, R_, scratch_.n);
    for (int64_t j = 0; j < scratch_.n; j += Traits<A>::N) store(to + j, load(to + j) + load(other + j));
    narrow(c_.sum, at, to, R_);
    if (size_of(c_.sum.type) != sizeof(A)) widen(to, c_.sum, at, R_, scratch_.n);  // as rounded
  }
  void count(Line<A>& line) const {
    const Wide<A> n = spread_row_mask(row_, line.o, buffer(), mask(), scratch_.n);
    line.each = 1 / (n > 1 ? n : 1);
    line.nothing = n == 0;
    line.first = 0;
    for (int64_t k = R_ - 1; k >= 0; k--) line.first = mask()[k] == Kind<A>::counted ? line.x[k] : line.first;
  }

  const Row& row_;
  const RowChunk& c_;
  const Scratch<A> scratch_;
  const int64_t R_;
  bool whole_;   // vectors, unmasked
  bool direct_;  // and as the arithmetic's type
};

// A huge row times a power of two, into scratch memory.
template <class A, bool centered, bool M> void rescale(Line<A>& line, A* buffer, const A* mask, int64_t R) {
  const A power = power_of<A>(line.x, M ? mask : nullptr, R, centered ? line.first : A(0));
  if (power == 1) return;
  for (int64_t j = 0; j < R; j++) buffer[j] = line.x[j] * power;
  line.x = buffer;
  line.s.power = power;
  around<A, centered, M>(line, mask, R, line.first * power);
}

template <class A, bool centered, bool M> void norm_rows(const Row& row, const RowChunk& c) {
  constexpr int64_t N = Traits<A>::N;
  constexpr Type own = sizeof(A) == 8 ? Type::f64 : Type::f32;
  const Scratch<A> scratch(row, c.scratch);
  const int64_t R = row.R, step = N * size_of(row.x.type);
  const bool aligned = R % N == 0;
  const A* const scale = whole_vectors<A>(row.scale, row, c.g, scratch.at(0));
  const A* const bias = whole_vectors<A>(row.bias, row, c.g, scratch.at(1));
  A* const out = scratch.at(4);
  const Lines<A, M> lines(row, c);
  const A* const mask = lines.mask();
  for (int64_t i = c.first; i < c.last; i++) {
    Line<A> line = lines.template read<centered>(i);
    Statistics<A>& s = line.s;
    if (!((s.square - s.square) == 0)) rescale<A, centered, M>(line, lines.buffer(), mask, R);
    const A total = s.square + A(c.epsilon) * s.power * s.power;
    const A rstd = line.nothing || total == 0 ? A(0) : A(1 / __builtin_sqrt(total));
    static_cast<A*>(c.stats.power)[line.o] = s.power;
    static_cast<A*>(c.stats.center)[line.o] = s.center;
    static_cast<A*>(c.stats.offset)[line.o] = s.offset;
    static_cast<A*>(c.stats.rstd)[line.o] = rstd;
    const int64_t at = line.o * R;
    const char* const next = static_cast<const char*>(row.x.at(row_number(row, least(i + 1, c.last - 1), c.g) * R));
    auto write = [&](auto* y, int64_t n, bool streamed) {
      write_row_of<A, std::remove_pointer_t<decltype(y)>, centered, M>(row.act, line.x, mask, scale, bias, n, s, rstd, y, streamed, next, step);
    };
    if (aligned && c.y.type == own) {
      write(static_cast<A*>(c.y.data) + at, R, c.stream);
    } else if (aligned && c.y.type == Type::bf16) {
      if constexpr (sizeof(A) == 4) write(static_cast<bf16*>(c.y.data) + at, R, c.stream);
    } else {
      write(out, scratch.n, false);
      narrow(c.y, at, out, R);
    }
  }
  if (c.stream) end_of_stream();
}

template <class A, bool M> void norm_rows_of(const Row& row, const RowChunk& c) {
  row.centered ? norm_rows<A, true, M>(row, c) : norm_rows<A, false, M>(row, c);
}

template <class A> void row_norm(const Row& row, const RowChunk& c) {
  row.mask.data ? norm_rows_of<A, true>(row, c) : norm_rows_of<A, false>(row, c);
}

}  // namespace

void row_norm_of(const Row& row, const RowChunk& c) { is_double(row.x.type) ? row_norm<double>(row, c) : row_norm<float>(row, c); }

}  // namespace JNORM_ISA
}  // namespace jnorm

// Row kernels over one chunk: a row is read from memory once, and stays in the nearest cache for what else it takes.
#include "vec.h"

namespace jnorm {
namespace JNORM_ISA {
namespace {

// Rows whose derivative is taken together, so that the sums for scale and bias are loaded and stored once for all of them.
constexpr int kTogether = 4;

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

// One row on its way: rows are taken some at a time, so that one's sums do not wait for another's.
template <class A> struct Line {
  const A* x;
  int64_t o;
  Wide<A> each;  // 1 / counted elements
  bool nothing;  // is counted
  A first;
  Statistics<A> s;
};

template <class A, bool M> class Lines {
 public:
  Lines(const Row& row, const RowChunk& c) : row_(row), c_(c), scratch_(row, c.scratch), R_(row.R) {
    direct_ = R_ % Traits<A>::N == 0 && !M && !c.residual && row.x.type == (sizeof(A) == 8 ? Type::f64 : Type::f32);
  }

  A* buffer(int t) const { return scratch_.at(2 + 2 * t); }
  A* mask(int t) const { return scratch_.at(3 + 2 * t); }

  // The row as the arithmetic's type, in scratch memory unless it is so already.
  JNORM_INLINE Line<A> read(int64_t i, int t) const {
    Line<A> line{};
    line.o = row_number(row_, i, c_.g);
    const int64_t at = line.o * R_;
    if (direct_) {
      line.x = static_cast<const A*>(row_.x.data) + at;
    } else {
      widen(buffer(t), row_.x, at, R_, scratch_.n);
      line.x = buffer(t);
    }
    if (c_.residual) add_residual(at, buffer(t), mask(t));
    line.each = Wide<A>(1) / (R_ ? R_ : 1);
    line.first = R_ ? line.x[0] : 0;
    line.nothing = R_ == 0;
    if constexpr (M) count(line, t);
    return line;
  }

 private:
  void add_residual(int64_t at, A* to, A* other) const {
    widen(other, c_.residual, at, R_, scratch_.n);
    for (int64_t j = 0; j < scratch_.n; j += Traits<A>::N) store(to + j, load(to + j) + load(other + j));
    narrow(c_.sum, at, to, R_);
    if (size_of(c_.sum.type) != sizeof(A)) widen(to, c_.sum, at, R_, scratch_.n);  // as rounded
  }
  void count(Line<A>& line, int t) const {
    const Wide<A> n = spread_row_mask(row_, line.o, buffer(t), mask(t), scratch_.n);
    line.each = 1 / (n > 1 ? n : 1);
    line.nothing = n == 0;
    line.first = 0;
    for (int64_t k = R_ - 1; k >= 0; k--) line.first = mask(t)[k] == Kind<A>::counted ? line.x[k] : line.first;
  }

  const Row& row_;
  const RowChunk& c_;
  const Scratch<A> scratch_;
  const int64_t R_;
  bool direct_;
};

// A huge row times a power of two, into scratch memory.
template <class A, bool centered, bool M> void rescale(Line<A>& line, A* buffer, const A* mask, int64_t R) {
  const A power = power_of<A>(line.x, M ? mask : nullptr, R, line.first);
  if (power == 1) return;
  for (int64_t j = 0; j < R; j++) buffer[j] = line.x[j] * power;
  line.x = buffer;
  line.s.power = power;
  const A first = line.first * power;
  if (centered) set_mean<A>(line.s, first + line.each * total<A, M>(buffer, mask, R, [=](V<A> v) { return v - first; }));
  line.s.square = mean_square<A, centered, M>(buffer, mask, R, line.each, line.s);
}

template <class A, bool centered, bool M> void norm_rows(const Row& row, const RowChunk& c) {
  constexpr int64_t N = Traits<A>::N;
  const Scratch<A> scratch(row, c.scratch);
  const int64_t R = row.R;
  const bool aligned = R % N == 0;
  const A* const scale = whole_vectors<A>(row.scale, row, c.g, scratch.at(0));
  const A* const bias = whole_vectors<A>(row.bias, row, c.g, scratch.at(1));
  A* const out = scratch.at(2 + 2 * kTogether);
  const Lines<A, M> lines(row, c);
  for (int64_t i = c.first; i < c.last;) {
    const int together = c.last - i < kTogether ? int(c.last - i) : kTogether;
    Line<A> line[kTogether];
    A rstd[kTogether];
    for (int t = 0; t < together; t++) {
      line[t] = lines.read(i + t, t);
      if (!centered) {
        line[t].first = 0;
        continue;
      }
      const A first = line[t].first;
      set_mean<A>(line[t].s, first + line[t].each * total<A, M>(line[t].x, lines.mask(t), R, [=](V<A> v) { return v - first; }));
    }
    for (int t = 0; t < together; t++) line[t].s.square = mean_square<A, centered, M>(line[t].x, lines.mask(t), R, line[t].each, line[t].s);
    for (int t = 0; t < together; t++) {
      Statistics<A>& s = line[t].s;
      if (!((s.square - s.square) == 0)) rescale<A, centered, M>(line[t], lines.buffer(t), lines.mask(t), R);
      const A total = s.square + A(c.epsilon) * s.power * s.power;
      rstd[t] = line[t].nothing || total == 0 ? A(0) : A(1 / __builtin_sqrt(total));
      static_cast<A*>(c.stats.power)[line[t].o] = s.power;
      static_cast<A*>(c.stats.center)[line[t].o] = s.center;
      static_cast<A*>(c.stats.offset)[line[t].o] = s.offset;
      static_cast<A*>(c.stats.rstd)[line[t].o] = rstd[t];
    }
    for (int t = 0; t < together; t++) {
      const int64_t at = line[t].o * R, after = least(i + together + t, c.last - 1), step = N * size_of(row.x.type);
      const char* const next = static_cast<const char*>(row.x.at(row_number(row, after, c.g) * R));
      const A* const mask = lines.mask(t);
      if (aligned && c.y.type == (sizeof(A) == 8 ? Type::f64 : Type::f32)) {
        A* const y = static_cast<A*>(c.y.data) + at;
        write_row_of<A, A, centered, M>(row.act, line[t].x, mask, scale, bias, R, line[t].s, rstd[t], y, c.stream, next, step);
        continue;
      }
      if constexpr (sizeof(A) == 4) {
        if (aligned && c.y.type == Type::bf16) {
          bf16* const y = static_cast<bf16*>(c.y.data) + at;
          write_row_of<A, bf16, centered, M>(row.act, line[t].x, mask, scale, bias, R, line[t].s, rstd[t], y, c.stream, next, step);
          continue;
        }
      }
      write_row_of<A, A, centered, M>(row.act, line[t].x, mask, scale, bias, scratch.n, line[t].s, rstd[t], out, false, next, step);
      narrow(c.y, at, out, R);
    }
    i += together;
  }
  if (c.stream) end_of_stream();
}

// --- the derivative's transpose -----------------------------------------------------------------------------------------------------

template <class A> struct OfRow {
  A power, center, offset, rstd;
  Wide<A> n;
};

// xhat and g = act'·dy of a row into scratch memory, and Σ g·scale and Σ g·scale·xhat. What is passed by value stays in registers.
template <class A, class S, class Y, Act act, bool M>
JNORM_INLINE void first_pass(const S* x, const Y* dy, const A* mask, const A* scale, const A* bias, int64_t n, const OfRow<A> of, A* xhat,
                             A* g, Wide<A>* sums, Act any) {
  constexpr int64_t N = Traits<A>::N;
  V<A> one0{}, one1{}, two0{}, two1{};
  auto step = [&](int64_t j, V<A>& one, V<A>& two) {
    const V<A> v = load(x + j) * of.power;
    V<A> hat = ((v - of.center) - of.offset) * of.rstd;
    if constexpr (M) hat = load(mask + j) == Kind<A>::unusable ? V<A>{} : hat;
    const V<A> weight = load(scale + j);
    const V<A> z = act == Act::none ? hat : hat * weight + load(bias + j);
    const V<A> slope = times_slope<act, A>(z, load(dy + j), any), through = slope * weight;
    store(xhat + j, hat);
    store(g + j, slope);
    one += through;
    two += through * hat;
  };
  int64_t j = 0;
  for (; j + 2 * N <= n; j += 2 * N) step(j, one0, two0), step(j + N, one1, two1);
  if (j < n) step(j, one0, two0);
  sums[0] = sum_of<A>(one0 + one1);
  sums[1] = sum_of<A>(two0 + two1);
}

template <class A> struct Second {
  const A *xhat, *g, *mask;
  const char *next_x, *next_dy;  // of a row that comes later
  A first, second, factor;  // Σ / n, 0 for a mean that is not subtracted; rstd·power
};

// dx of T rows, and the sums for scale and bias.
template <class A, class S, bool M, bool adds, int T>
JNORM_INLINE void second_pass(const Second<A>* rows, const A* scale, int64_t n, S* const* to, const S* const* dsum, A* dscale, A* dbias,
                              bool streamed, int64_t x_size, int64_t dy_size) {
  Second<A> of[T];
  S* dx[T];
  const S* sum[T];
  for (int t = 0; t < T; t++) of[t] = rows[t], dx[t] = to[t], sum[t] = dsum[t];
  for (int64_t j = 0; j < n; j += Traits<A>::N) {
    const V<A> weight = load(scale + j);
    V<A> ds = load(dscale + j), db = load(dbias + j);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      prefetch(of[t].next_x + j * x_size);
      prefetch(of[t].next_dy + j * dy_size);
      const V<A> hat = load(of[t].xhat + j), g = load(of[t].g + j);
      V<A> through = g * weight, back = hat * of[t].second + of[t].first;
      if constexpr (M) {
        const V<A> kind = load(of[t].mask + j);
        through = kind == Kind<A>::unusable ? V<A>{} : through;
        back = kind == Kind<A>::counted ? back : V<A>{};
      }
      V<A> d = (through - back) * of[t].factor;
      if constexpr (adds) d += load(sum[t] + j);
      if (streamed) {
        stream(dx[t] + j, d);
      } else {
        store(dx[t] + j, d);
      }
      ds += g * hat;
      db += g;
    }
    store(dscale + j, ds);
    store(dbias + j, db);
  }
}

template <class A, class S, bool M, int T>
void second_pass_of(const Second<A>* of, const A* scale, int64_t n, S* const* dx, const S* const* dsum, A* dscale, A* dbias, bool streamed,
                    int64_t x_size, int64_t dy_size) {
  dsum[0] ? second_pass<A, S, M, true, T>(of, scale, n, dx, dsum, dscale, dbias, streamed, x_size, dy_size)
          : second_pass<A, S, M, false, T>(of, scale, n, dx, dsum, dscale, dbias, streamed, x_size, dy_size);
}

template <class A, class S, class Y, bool M>
void first_pass_of(Act act, const S* x, const Y* dy, const A* mask, const A* scale, const A* bias, int64_t n, const OfRow<A>& of, A* xhat,
                   A* g, Wide<A>* sums) {
  act == Act::none ? first_pass<A, S, Y, Act::none, M>(x, dy, mask, scale, bias, n, of, xhat, g, sums, act)
                   : first_pass<A, S, Y, kAnyAct, M>(x, dy, mask, scale, bias, n, of, xhat, g, sums, act);
}

// With `staged`, S and Y are A.
template <class A, class S, class Y, bool M, bool staged> void cotangent_rows(const Row& row, const RowChunk& c) {
  const Scratch<A> scratch(row, c.scratch);
  const A* const scale = whole_vectors<A>(row.scale, row, c.g, scratch.at(0));
  const A* const bias = whole_vectors<A>(row.bias, row, c.g, scratch.at(1));
  A *const block_scale = scratch.at(2), *const block_bias = scratch.at(3);
  constexpr int T = staged ? 1 : kTogether;
  A *const staged_x = scratch.at(4 + 2), *const staged_dy = scratch.at(4 + 3), *const mask = scratch.at(4 + 4),
          *const staged_dsum = scratch.at(4 + 5), *const staged_dx = scratch.at(4 + 6);
  auto* const dscale = static_cast<Wide<A>*>(c.dscale);
  auto* const dbias = static_cast<Wide<A>*>(c.dbias);
  const int64_t n = staged ? scratch.n : row.R, x_size = size_of(row.x.type), dy_size = size_of(c.dy.type);
  for (int64_t begin = c.first; begin < c.last; begin += kRowBlock) {
    const int64_t end = begin + kRowBlock < c.last ? begin + kRowBlock : c.last;
    for (int64_t j = 0; j < n; j++) block_scale[j] = block_bias[j] = 0;
    for (int64_t i = begin; i < end;) {
      const int together = i + T <= end ? T : 1;
      Second<A> of[T];
      S* dx[T];
      const S* dsum[T];
      for (int t = 0; t < together; t++) {
        const int64_t o = row_number(row, i + t, c.g), at = o * row.R;
        OfRow<A> r{static_cast<const A*>(c.stats.power)[o], static_cast<const A*>(c.stats.center)[o],
                   static_cast<const A*>(c.stats.offset)[o], static_cast<const A*>(c.stats.rstd)[o], Wide<A>(row.R)};
        A *const xhat = scratch.at(4 + 2 * t), *const g = scratch.at(5 + 2 * t);
        Wide<A> sums[2] = {};
        if constexpr (staged) {
          widen(staged_x, row.x, at, row.R, scratch.n);
          // Beyond the row what is in it: 0 might be out of range when it is normalized like a huge row.
          for (int64_t k = row.R; k < scratch.n; k++) staged_x[k] = staged_x[0];
          widen(staged_dy, c.dy, at, row.R, scratch.n);
          if (c.dsum) widen(staged_dsum, c.dsum, at, row.R, scratch.n);
          if constexpr (M) r.n = spread_row_mask(row, o, staged_x, mask, scratch.n);
          first_pass_of<A, A, A, M>(row.act, staged_x, staged_dy, mask, scale, bias, n, r, xhat, g, sums);
          dx[t] = staged_dx;
          dsum[t] = c.dsum ? staged_dsum : nullptr;
        } else {
          first_pass_of<A, S, Y, false>(row.act, static_cast<const S*>(row.x.data) + at, static_cast<const Y*>(c.dy.data) + at, nullptr, scale,
                                        bias, n, r, xhat, g, sums);
          dx[t] = static_cast<S*>(c.dx.data) + at;
          dsum[t] = c.dsum ? static_cast<const S*>(c.dsum.data) + at : nullptr;
        }
        const Wide<A> divisor = r.n > 1 ? r.n : 1;
        const int64_t after = row_number(row, least(i + together + t, c.last - 1), c.g) * row.R;
        of[t] = {xhat, g, mask, static_cast<const char*>(row.x.at(after)), static_cast<const char*>(c.dy.at(after)), row.centered ? A(sums[0] / divisor) : A(0), A(sums[1] / divisor), r.rstd * r.power};
      }
      if (together == T) {
        second_pass_of<A, S, M, T>(of, scale, n, dx, dsum, block_scale, block_bias, c.stream && !staged, x_size, dy_size);
      } else {
        second_pass_of<A, S, M, 1>(of, scale, n, dx, dsum, block_scale, block_bias, c.stream && !staged, x_size, dy_size);
      }
      if constexpr (staged) narrow(c.dx, row_number(row, i, c.g) * row.R, staged_dx, row.R);
      i += together;
    }
    for (int64_t j = 0; j < row.R; j++) dscale[j] += block_scale[j], dbias[j] += block_bias[j];
  }
  if (c.stream) end_of_stream();
}

template <class A, bool M> void norm_rows_of(const Row& row, const RowChunk& c) {
  row.centered ? norm_rows<A, true, M>(row, c) : norm_rows<A, false, M>(row, c);
}

template <class A> void row_norm(const Row& row, const RowChunk& c) {
  row.mask.data ? norm_rows_of<A, true>(row, c) : norm_rows_of<A, false>(row, c);
}

template <class A> void row_cotangent(const Row& row, const RowChunk& c) {
  if (row.mask.data) return cotangent_rows<A, A, A, true, true>(row, c);
  const Type x = row.x.type, y = c.dy.type;
  if (row.R % Traits<A>::N == 0) {
    if constexpr (sizeof(A) == 8) {
      return cotangent_rows<A, double, double, false, false>(row, c);
    } else {
      if (x == Type::f32 && y == Type::f32) return cotangent_rows<A, float, float, false, false>(row, c);
      if (x == Type::bf16 && y == Type::bf16) return cotangent_rows<A, bf16, bf16, false, false>(row, c);
      if (x == Type::bf16 && y == Type::f32) return cotangent_rows<A, bf16, float, false, false>(row, c);
    }
  }
  cotangent_rows<A, A, A, false, true>(row, c);
}

}  // namespace

void row_norm_of(const Row& row, const RowChunk& c) { is_double(row.x.type) ? row_norm<double>(row, c) : row_norm<float>(row, c); }
void row_cotangent_of(const Row& row, const RowChunk& c) { is_double(row.x.type) ? row_cotangent<double>(row, c) : row_cotangent<float>(row, c); }

}  // namespace JNORM_ISA
}  // namespace jnorm

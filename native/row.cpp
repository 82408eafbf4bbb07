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
  for (int64_t i = row.R; i < filled; i++) mask[i] = Kind<A>::mapped;
  return n;
}

template <class A> struct Scratch {
  static constexpr int kRows = 4 + 2 * kTogether + 2;
  int64_t n;
  A* base;
  Scratch(const Row& row, void* p) : n(padded(row.R, Traits<A>::N)), base(static_cast<A*>(p)) {}
  A* at(int i) const { return base + i * n; }
};

// Scale or bias with room for whole vectors.
template <class A> const A* whole_vectors(const void* p, const Row& row, int64_t g, A* to) {
  const A* from = static_cast<const A*>(p) + g * row.R;
  if (row.R % Traits<A>::N == 0) return from;
  widen_from(to, from, row.R);
  for (int64_t i = row.R; i < padded(row.R, Traits<A>::N); i++) to[i] = 0;
  return to;
}

// Statistics of a row of n counted elements that lies in memory as vectors; `mask` where there is one.
template <class A> struct Statistics {
  A power = 1, center = 0, offset = 0, square = 0;
};

template <class A, bool centered, bool M> Statistics<A> statistics(const A* x, const A* mask, int64_t R, Wide<A> n, A first) {
  constexpr int64_t N = Traits<A>::N;
  const int64_t whole = R / N;
  const I<A> tail = lanes_below<A>(R % N);
  Statistics<A> s;
  auto total = [&](auto of) {
    V<A> sum[4] = {};
    auto one = [&](int64_t v) {
      const V<A> d = of(load(x + v * N));
      if constexpr (M) return load(mask + v * N) == Kind<A>::counted ? d : V<A>{};
      return d;
    };
    int64_t v = 0;
    for (; v + 4 <= whole; v += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) sum[k] += one(v + k);
    }
    for (; v < whole; v++) sum[0] += one(v);
    if (R % N) sum[1] += tail ? one(whole) : V<A>{};
    return sum_of<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  };
  if constexpr (centered) {
    const Wide<A> mean = first + total([&](V<A> v) { return v - first; }) / n;
    s.center = A(mean);
    s.offset = A(mean - s.center);
  }
  const A center = s.center, offset = s.offset;
  s.square = A(total([&](V<A> v) {
                 const V<A> d = centered ? (v - center) - offset : v;
                 return d * d;
               }) / n);
  return s;
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
                            bool streamed) {
  const A center = s.center, offset = s.offset;
  for (int64_t j = 0; j < n; j += Traits<A>::N) {
    const V<A> v = load(x + j);
    V<A> d = centered ? (v - center) - offset : v;
    if constexpr (M) d = load(mask + j) == Kind<A>::unusable ? V<A>{} : d;
    const V<A> out = activate<act, A>(d * rstd * load(scale + j) + load(bias + j));
    if (streamed) {
      stream(y + j, out);
    } else {
      store(y + j, out);
    }
  }
}

template <class A, class Y, bool centered, bool M>
void write_row_of(Act act, const A* x, const A* mask, const A* scale, const A* bias, int64_t n, const Statistics<A>& s, A rstd, Y* y,
                  bool streamed) {
  switch (act) {
    case Act::none: return write_row<A, Y, Act::none, centered, M>(x, mask, scale, bias, n, s, rstd, y, streamed);
    case Act::relu: return write_row<A, Y, Act::relu, centered, M>(x, mask, scale, bias, n, s, rstd, y, streamed);
    case Act::leaky_relu: return write_row<A, Y, Act::leaky_relu, centered, M>(x, mask, scale, bias, n, s, rstd, y, streamed);
    case Act::silu: return write_row<A, Y, Act::silu, centered, M>(x, mask, scale, bias, n, s, rstd, y, streamed);
    case Act::gelu: return write_row<A, Y, Act::gelu, centered, M>(x, mask, scale, bias, n, s, rstd, y, streamed);
  }
}

template <class A, bool centered, bool M> void norm_rows(const Row& row, const RowChunk& c) {
  constexpr int64_t N = Traits<A>::N;
  const Scratch<A> scratch(row, c.scratch);
  const bool aligned = row.R % N == 0;
  const A* const scale = whole_vectors<A>(row.scale, row, c.g, scratch.at(0));
  const A* const bias = whole_vectors<A>(row.bias, row, c.g, scratch.at(1));
  A *const buffer = scratch.at(2), *const mask = scratch.at(3), *const out = scratch.at(4), *const other = scratch.at(5);
  const bool direct = aligned && !M && !c.residual && row.x.type == (sizeof(A) == 8 ? Type::f64 : Type::f32);
  for (int64_t i = c.first; i < c.last; i++) {
    const int64_t o = row_number(row, i, c.g), at = o * row.R;
    const A* x = buffer;
    if (direct) {
      x = static_cast<const A*>(row.x.data) + at;
    } else {
      widen(buffer, row.x, at, row.R, scratch.n);
    }
    if (c.residual) {
      widen(other, c.residual, at, row.R, scratch.n);
      for (int64_t j = 0; j < scratch.n; j += N) store(buffer + j, load(buffer + j) + load(other + j));
      narrow(c.sum, at, buffer, row.R);
      widen(buffer, c.sum, at, row.R, scratch.n);  // as rounded
    }
    Wide<A> n = row.R;
    A first = x[0];
    if constexpr (M) {
      n = spread_row_mask(row, o, buffer, mask, scratch.n);
      first = 0;
      for (int64_t k = row.R - 1; k >= 0; k--) first = mask[k] == Kind<A>::counted ? x[k] : first;
    }
    const Wide<A> divisor = n > 1 ? n : 1;
    if (!centered) first = 0;
    Statistics<A> s = statistics<A, centered, M>(x, mask, row.R, divisor, first);
    if (!((s.square - s.square) == 0)) {
      const A power = power_of<A>(x, M ? mask : nullptr, row.R, first);
      if (power != 1) {
        for (int64_t j = 0; j < row.R; j++) buffer[j] = x[j] * power;
        x = buffer;
        s = statistics<A, centered, M>(x, mask, row.R, divisor, first * power);
        s.power = power;
      }
    }
    const A total = s.square + A(c.epsilon) * s.power * s.power;
    const A rstd = n == 0 || total == 0 ? A(0) : A(1 / __builtin_sqrt(total));
    static_cast<A*>(c.stats.power)[o] = s.power;
    static_cast<A*>(c.stats.center)[o] = s.center;
    static_cast<A*>(c.stats.offset)[o] = s.offset;
    static_cast<A*>(c.stats.rstd)[o] = rstd;
    if (aligned && c.y.type == (sizeof(A) == 8 ? Type::f64 : Type::f32)) {
      write_row_of<A, A, centered, M>(row.act, x, mask, scale, bias, row.R, s, rstd, static_cast<A*>(c.y.data) + at, c.stream);
      continue;
    }
    if constexpr (sizeof(A) == 4) {
      if (aligned && c.y.type == Type::bf16) {
        write_row_of<A, bf16, centered, M>(row.act, x, mask, scale, bias, row.R, s, rstd, static_cast<bf16*>(c.y.data) + at, c.stream);
        continue;
      }
    }
    write_row_of<A, A, centered, M>(row.act, x, mask, scale, bias, scratch.n, s, rstd, out, false);
    narrow(c.y, at, out, row.R);
  }
  if (c.stream) end_of_stream();
}

// --- the derivative's transpose -----------------------------------------------------------------------------------------------------

template <class A> struct OfRow {
  A power, center, offset, rstd;
  Wide<A> n;
};

// xhat and g = act'·dy of a row into scratch memory, and Σ g·scale and Σ g·scale·xhat.
template <class A, class S, class Y, Act act, bool M>
JNORM_INLINE void first_pass(const S* x, const Y* dy, const A* mask, const A* scale, const A* bias, int64_t n, const OfRow<A>& of, A* xhat,
                             A* g, Wide<A>* sums) {
  constexpr int64_t N = Traits<A>::N;
  V<A> one[2] = {}, two[2] = {};
  auto step = [&](int64_t j, int k) {
    const V<A> v = load(x + j) * of.power;
    V<A> hat = ((v - of.center) - of.offset) * of.rstd;
    if constexpr (M) hat = load(mask + j) == Kind<A>::unusable ? V<A>{} : hat;
    const V<A> weight = load(scale + j);
    const V<A> z = act == Act::none ? hat : hat * weight + load(bias + j);
    const V<A> slope = times_slope<act, A>(z, load(dy + j)), through = slope * weight;
    store(xhat + j, hat);
    store(g + j, slope);
    one[k] += through;
    two[k] += through * hat;
  };
  int64_t j = 0;
  for (; j + 2 * N <= n; j += 2 * N) step(j, 0), step(j + N, 1);
  if (j < n) step(j, 0);
  sums[0] = sum_of<A>(one[0] + one[1]);
  sums[1] = sum_of<A>(two[0] + two[1]);
}

template <class A, bool M> struct Second {
  const A *xhat, *g, *mask;
  A first, second, factor;  // Σ / n, 0 for a mean that is not subtracted; rstd·power
};

// dx of T rows, and the sums for scale and bias.
template <class A, class S, bool M, int T>
JNORM_INLINE void second_pass(const Second<A, M>* of, const A* scale, int64_t n, S* const* dx, const S* const* dsum, A* dscale, A* dbias,
                              bool streamed) {
  for (int64_t j = 0; j < n; j += Traits<A>::N) {
    const V<A> weight = load(scale + j);
    V<A> ds = load(dscale + j), db = load(dbias + j);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const V<A> hat = load(of[t].xhat + j), g = load(of[t].g + j);
      V<A> through = g * weight, back = hat * of[t].second + of[t].first;
      if constexpr (M) {
        const V<A> kind = load(of[t].mask + j);
        through = kind == Kind<A>::unusable ? V<A>{} : through;
        back = kind == Kind<A>::counted ? back : V<A>{};
      }
      V<A> d = (through - back) * of[t].factor;
      if (dsum[t]) d += load(dsum[t] + j);
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

template <class A, class S, class Y, bool M>
void first_pass_of(Act act, const S* x, const Y* dy, const A* mask, const A* scale, const A* bias, int64_t n, const OfRow<A>& of, A* xhat,
                   A* g, Wide<A>* sums) {
  switch (act) {
    case Act::none: return first_pass<A, S, Y, Act::none, M>(x, dy, mask, scale, bias, n, of, xhat, g, sums);
    case Act::relu: return first_pass<A, S, Y, Act::relu, M>(x, dy, mask, scale, bias, n, of, xhat, g, sums);
    case Act::leaky_relu: return first_pass<A, S, Y, Act::leaky_relu, M>(x, dy, mask, scale, bias, n, of, xhat, g, sums);
    case Act::silu: return first_pass<A, S, Y, Act::silu, M>(x, dy, mask, scale, bias, n, of, xhat, g, sums);
    case Act::gelu: return first_pass<A, S, Y, Act::gelu, M>(x, dy, mask, scale, bias, n, of, xhat, g, sums);
  }
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
  const int64_t n = staged ? scratch.n : row.R;
  for (int64_t begin = c.first; begin < c.last; begin += kRowBlock) {
    const int64_t end = begin + kRowBlock < c.last ? begin + kRowBlock : c.last;
    for (int64_t j = 0; j < n; j++) block_scale[j] = block_bias[j] = 0;
    for (int64_t i = begin; i < end;) {
      const int together = i + T <= end ? T : 1;
      Second<A, M> of[T];
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
        of[t] = {xhat, g, mask, row.centered ? A(sums[0] / divisor) : A(0), A(sums[1] / divisor), r.rstd * r.power};
      }
      if (together == T) {
        second_pass<A, S, M, T>(of, scale, n, dx, dsum, block_scale, block_bias, c.stream && !staged);
      } else {
        second_pass<A, S, M, 1>(of, scale, n, dx, dsum, block_scale, block_bias, c.stream && !staged);
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
      if (x == Type::f32 && y == Type::bf16) return cotangent_rows<A, float, bf16, false, false>(row, c);
    }
  }
  cotangent_rows<A, A, A, false, true>(row, c);
}

}  // namespace

void row_norm_of(const Row& row, const RowChunk& c) { is_double(row.x.type) ? row_norm<double>(row, c) : row_norm<float>(row, c); }
void row_cotangent_of(const Row& row, const RowChunk& c) { is_double(row.x.type) ? row_cotangent<double>(row, c) : row_cotangent<float>(row, c); }

}  // namespace JNORM_ISA
}  // namespace jnorm

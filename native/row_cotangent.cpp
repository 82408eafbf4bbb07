// The transposed derivative of a chunk's row norms.
#include <type_traits>

#include "act.h"
#include "row.h"

namespace jnorm {
namespace JNORM_ISA {
namespace {

template <class A> struct OfRow {
  A power, center, offset, rstd;
  Wide<A> n;
  JNORM_INLINE V<A> deviation(V<A> x) const { return (x * power - center) - offset; }
};

// A chunk's scale and bias, and where x is y, 1 / scale.
template <class A> struct Affine {
  const A *scale, *bias, *inverse;
};

// Whether xhat and g are computed once more in the second pass, rather than stored between: where that takes little.
template <Act act, bool M> constexpr bool kAgain = act == Act::none && !M;

// xhat and g = act'·dy of a row into scratch memory, and Σ g·scale and Σ g·scale·xhat. What is passed by value stays in registers.
template <class A, class S, class Y, Act act, bool M>
JNORM_INLINE void first_pass(const S* x, const Y* dy, const A* mask, const Affine<A> affine, int64_t n, const OfRow<A> of, A* xhat, A* g,
                             Wide<A>* sums, Act any) {
  constexpr int64_t N = Traits<A>::N;
  V<A> one0{}, one1{}, two0{}, two1{};
  auto step = [&](int64_t j, V<A>& one, V<A>& two) {
    const V<A> weight = load(affine.scale + j);
    V<A> z, hat;
    if constexpr (act == kOutput) {
      z = inverted<A>(load(x + j), any);
      hat = (z - load(affine.bias + j)) * load(affine.inverse + j);
    } else {
      hat = of.deviation(load(x + j));
    }
    if constexpr (M) hat = load(mask + j) == Kind<A>::unusable ? V<A>{} : hat;
    if constexpr (act != kOutput) {
      hat *= of.rstd;
      z = act == Act::none ? hat : hat * weight + load(affine.bias + j);
    }
    const V<A> slope = times_slope<act, A>(z, load(dy + j), any), through = slope * weight;
    if constexpr (!kAgain<act, M>) {
      store(xhat + j, hat);
      store(g + j, slope);
    }
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
  const void *x, *dy;  // or xhat and g
  OfRow<A> stats;
  const A* mask;
  const char *next_x, *next_dy;  // of a row that comes later
  A first, second, factor;  // Σ / n, 0 for a mean that is not subtracted; rstd·power
};

// dx of T rows, and the sums for scale and bias. X and Y are the types of x and dy where xhat and g are computed again.
template <class A, class S, class X, class Y, bool M, bool adds, bool again, int T>
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
      const V<A> g = load(static_cast<const Y*>(of[t].dy) + j);
      V<A> hat = load(static_cast<const X*>(of[t].x) + j);
      if constexpr (again) hat = of[t].stats.deviation(hat) * of[t].stats.rstd;
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

template <class A, class S, class Y, bool M, int T>
void second_pass_of(bool again, const Second<A>* of, const A* scale, int64_t n, S* const* dx, const S* const* dsum, A* dscale, A* dbias,
                    bool streamed, int64_t x_size, int64_t dy_size) {
  auto run = [&](auto adds) {
    if constexpr (!M) {
      if (again) return second_pass<A, S, S, Y, M, adds, true, T>(of, scale, n, dx, dsum, dscale, dbias, streamed, x_size, dy_size);
    }
    second_pass<A, S, A, A, M, adds, false, T>(of, scale, n, dx, dsum, dscale, dbias, streamed, x_size, dy_size);
  };
  dsum[0] ? run(std::true_type()) : run(std::false_type());
}

template <class A, class S, class Y, bool M>
void first_pass_of(Act act, const S* x, const Y* dy, const A* mask, const Affine<A>& affine, int64_t n, const OfRow<A>& of, A* xhat, A* g,
                   Wide<A>* sums) {
  affine.inverse     ? first_pass<A, S, Y, kOutput, M>(x, dy, mask, affine, n, of, xhat, g, sums, act)
  : act == Act::none ? first_pass<A, S, Y, Act::none, M>(x, dy, mask, affine, n, of, xhat, g, sums, act)
                     : first_pass<A, S, Y, kAnyAct, M>(x, dy, mask, affine, n, of, xhat, g, sums, act);
}

template <class A> const A* inverse_of(const A* scale, int64_t n, A* to) {
  for (int64_t j = 0; j < n; j++) to[j] = scale[j] == 0 ? A(0) : 1 / scale[j];
  return to;
}

// With `staged`, S and Y are A.
template <class A, class S, class Y, bool M, bool staged> void cotangent_rows(const Row& row, const RowChunk& c) {
  const Scratch<A> scratch(row, c.scratch);
  const A* const scale = whole_vectors<A>(row.scale, row, c.g, scratch.at(0));
  const Affine<A> affine{scale, whole_vectors<A>(row.bias, row, c.g, scratch.at(1)),
                         row.output ? inverse_of<A>(scale, scratch.n, scratch.at(12)) : nullptr};
  A *const block_scale = scratch.at(2), *const block_bias = scratch.at(3);
  constexpr int T = staged ? 1 : kTogether;
  // Of short rows scale and the two sums stay in the nearest cache as well.
  const bool several = 3 * row.R * int64_t(sizeof(A)) > kNearCacheBytes / 2;
  A *const staged_x = scratch.at(4 + 2), *const staged_dy = scratch.at(4 + 3), *const mask = scratch.at(4 + 4),
          *const staged_dsum = scratch.at(4 + 5), *const staged_dx = scratch.at(4 + 6);
  auto* const dscale = static_cast<Wide<A>*>(c.dscale);
  auto* const dbias = static_cast<Wide<A>*>(c.dbias);
  const bool again = kAgain<Act::none, M> && row.act == Act::none && !row.output;
  const int64_t n = staged ? scratch.n : row.R, x_size = size_of(row.x.type), dy_size = size_of(c.dy.type);
  for (int64_t begin = c.first; begin < c.last; begin += kRowBlock) {
    const int64_t end = begin + kRowBlock < c.last ? begin + kRowBlock : c.last;
    for (int64_t j = 0; j < n; j++) block_scale[j] = block_bias[j] = 0;
    for (int64_t i = begin; i < end;) {
      const int together = several && i + T <= end ? T : 1;
      Second<A> of[T];
      S* dx[T];
      const S* dsum[T];
      for (int t = 0; t < together; t++) {
        const int64_t o = row_number(row, i + t, c.g), at = o * row.R;
        OfRow<A> r{static_cast<const A*>(c.stats.power)[o], static_cast<const A*>(c.stats.center)[o],
                   static_cast<const A*>(c.stats.offset)[o], static_cast<const A*>(c.stats.rstd)[o], Wide<A>(row.R)};
        A *const xhat = scratch.at(4 + 2 * t), *const g = scratch.at(5 + 2 * t);
        const void *x = xhat, *dy = g;
        Wide<A> sums[2] = {};
        if constexpr (staged) {
          widen(staged_x, row.x, at, row.R, scratch.n);
          // Beyond the row what is in it: 0 might be out of range when it is normalized like a huge row.
          for (int64_t k = row.R; k < scratch.n; k++) staged_x[k] = staged_x[0];
          widen(staged_dy, c.dy, at, row.R, scratch.n);
          if (c.dsum) widen(staged_dsum, c.dsum, at, row.R, scratch.n);
          if constexpr (M) r.n = spread_row_mask(row, o, staged_x, mask, scratch.n);
          first_pass_of<A, A, A, M>(row.act, staged_x, staged_dy, mask, affine, n, r, xhat, g, sums);
          if (again) x = staged_x, dy = staged_dy;
          dx[t] = staged_dx;
          dsum[t] = c.dsum ? staged_dsum : nullptr;
        } else {
          const S* const own_x = static_cast<const S*>(row.x.data) + at;
          const Y* const own_dy = static_cast<const Y*>(c.dy.data) + at;
          first_pass_of<A, S, Y, false>(row.act, own_x, own_dy, nullptr, affine, n, r, xhat, g, sums);
          if (again) x = own_x, dy = own_dy;
          dx[t] = static_cast<S*>(c.dx.data) + at;
          dsum[t] = c.dsum ? static_cast<const S*>(c.dsum.data) + at : nullptr;
        }
        const Wide<A> divisor = r.n > 1 ? r.n : 1;
        const int64_t after = row_number(row, least(i + together + t, c.last - 1), c.g) * row.R;
        const char *const next_x = static_cast<const char*>(row.x.at(after)), *const next_dy = static_cast<const char*>(c.dy.at(after));
        const A first = row.centered ? A(sums[0] / divisor) : A(0), second = A(sums[1] / divisor);
        of[t] = {x, dy, r, mask, next_x, next_dy, first, second, r.rstd * r.power};
      }
      if (together == T) {
        second_pass_of<A, S, Y, M, T>(again, of, scale, n, dx, dsum, block_scale, block_bias, c.stream && !staged, x_size, dy_size);
      } else {
        second_pass_of<A, S, Y, M, 1>(again, of, scale, n, dx, dsum, block_scale, block_bias, c.stream && !staged, x_size, dy_size);
      }
      if constexpr (staged) narrow(c.dx, row_number(row, i, c.g) * row.R, staged_dx, row.R);
      i += together;
    }
    for (int64_t j = 0; j < row.R; j++) dscale[j] += block_scale[j], dbias[j] += block_bias[j];
  }
  if (c.stream) end_of_stream();
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

void row_cotangent_of(const Row& row, const RowChunk& c) {
  is_double(row.x.type) ? row_cotangent<double>(row, c) : row_cotangent<float>(row, c);
}

}  // namespace JNORM_ISA
}  // namespace jnorm

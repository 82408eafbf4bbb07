// Statistics along rows.
#pragma once

#include "columns.h"

namespace driver {

// A case of rows is one of columns: [O, R] is [O, R, 1].
struct RowCase : Case {
  int64_t inner, G;
  bool centered, huge;
  Real epsilon = 1e-5L;
  Reals scale, bias, sum;
  std::vector<Moments> sets;
  RowCase(Random& random, const Shape& s, Type t, bool any_infinite) : Case(random, s, t, false, any_infinite) {
    G = s.O % 2 == 0 && s.O ? one_of<int64_t>(random, {1, 2}) : 1;
    inner = s.O % (2 * G) == 0 && s.O ? one_of<int64_t>(random, {1, 2}) : 1;
    centered = random() % 2, huge = any_infinite && random() % 8 == 0 && type != Type::f16;
    scale = normal(random, G * s.R, arithmetic, 1, 0.5L), bias = normal(random, G * s.R, arithmetic, 0, 0.5L);
    if (huge) residual.clear();
    for (Real& v : x) v = huge ? rounded(type, v * (type == Type::f64 ? 0x1p800L : 0x1p100L)) : v;
    for (size_t i = 0; i < residual.size(); i++) x[i] = rounded(type, rounded(arithmetic, x[i] + residual[i]));
    // x is the sum from here on.
    sets = statistics(1);
    if (!centered) around_zero();
    name += std::string(centered ? "" : ", not centered") + (huge ? ", huge" : "");
    name += ", inner " + std::to_string(inner) + ", G " + std::to_string(G);
  }
  // Each square is rounded, and their sum.
  void around_zero() {
    for (Moments& m : sets) m = {m.n, 0, 0, 0, 0};
    each([&](int64_t o, int64_t r, int64_t, int64_t i) {
      if (mask.counts(o, r, 0)) sets[o].m2 += x[i] * x[i];
    });
    for (Moments& m : sets) m.m2_error = kTerms * u * m.m2;
  }
  bool usable(int64_t o, int64_t r, int64_t i) const { return Case::usable(o, r, 0, i); }
  // Some of the scale is 0.
  void told_from_y(Random& random) {
    may_be_output(random);
    for (Real& v : scale) v = output && random() % 16 == 0 ? 0 : v;
  }
  int64_t affine(int64_t o, int64_t r) const { return o / inner % G * shape.R + r; }
  jnorm::Row operands(Operands& in, const Reals& of) const {
    return {shape.O, shape.R, G, inner, in.add(type, of), mask.mask, in.small(*this, scale), in.small(*this, bias), act, centered,
            output};
  }
};

inline std::string row_statistics_differ(const RowCase& c, const Results& out, size_t first) {
  const Tensor &power = out[first], &center = out[first + 1], &offset = out[first + 2], &rstd = out[first + 3];
  for (int64_t o = 0; o < c.shape.O; o++) {
    const Moments& s = c.sets[o];
    if (!std::isfinite(s.m2)) continue; // y says whether it propagates
    const Real p = power.at(o), mean = (center.at(o) + offset.at(o)) / p;
    if (c.huge ? !(p > 0 && p <= 1) : p != 1) return "power[" + std::to_string(o) + "] is " + std::to_string(static_cast<double>(p));
    if (!(std::fabs(mean - s.mean) <= s.mean_error)) return "mean[" + std::to_string(o) + "] is wrong";
    const Value r = rstd_of(s, c.epsilon, c.u);
    if (!agrees(c.arithmetic, rstd.at(o), {r.value / p, r.error / p})) return "rstd[" + std::to_string(o) + "] is wrong";
  }
  return "";
}

inline void test_row_norm(Random& random, const Shape& shape, Type type) {
  RowCase c(random, shape, type, true);
  Operands in(random);
  // With a residual the sum is x + residual as rounded: an x whose sum is that is x = sum - residual where that is exact, and 0 else.
  Reals x = c.x;
  for (size_t i = 0; i < c.residual.size(); i++) c.residual[i] = rounded(c.other, c.x[i]), x[i] = rounded(type, c.x[i] - c.residual[i]);
  for (size_t i = 0; i < c.residual.size(); i++) {
    if (rounded(type, rounded(c.arithmetic, x[i] + c.residual[i])) != c.x[i]) x[i] = c.x[i], c.residual[i] = 0;
  }
  const jnorm::Row row = c.operands(in, x);
  const Array residual = c.residual.empty() ? Array() : in.add(c.other, c.residual);
  std::vector<Value> y(shape.size());
  c.each([&](int64_t o, int64_t r, int64_t, int64_t i) {
    const Value rstd = rstd_of(c.sets[o], c.epsilon, c.u);
    const Value hat = c.usable(o, r, i) ? times(deviation(c.sets[o], c.x[i], c.u), rstd, c.u) : Value{0, 0};
    const int64_t k = c.affine(o, r);
    y[i] = activated(c.act, plus(times(hat, c.scale[k], c.u), {c.bias[k], 0}, c.u), c.u);
  });
  const std::vector<Value> none(shape.O);
  const Type a = c.arithmetic;
  std::vector<Result> results{{"y", c.other, y}};
  for (const char* name : {"power", "center", "offset", "rstd"}) results.push_back({name, a, none, false});
  if (residual) results.push_back({"sum", type, exactly(c.x)});
  test("row_norm of " + c.name, results,
       [&](Isa isa, jnorm::Pool& pool, std::vector<Array> out) {
         jnorm::row_norm(isa, pool, row, static_cast<double>(c.epsilon), residual, out[0], residual ? out[5] : Array(),
                         {out[1].data, out[2].data, out[3].data, out[4].data});
       },
       random, [&](const Results& out) { return row_statistics_differ(c, out, 1); });
}

inline void test_row_cotangent(Random& random, const Shape& shape, Type type) {
  RowCase c(random, shape, type, false);
  c.told_from_y(random);
  Operands in(random);
  const jnorm::Row row = c.operands(in, c.x);
  const Real u = c.u;
  Reals power, center, offset, rstd;
  for (int64_t o = 0; o < shape.O; o++) {
    power.push_back(random() % 2 ? 1 : 0.5L);
    center.push_back(rounded(c.arithmetic, c.sets[o].mean * power[o]));
    offset.push_back(rounded(c.arithmetic, c.sets[o].mean * power[o] - center[o]));
    rstd.push_back(rounded(c.arithmetic, rstd_of(c.sets[o], c.epsilon, u).value / power[o]));
  }
  const auto pointer = [&](const Reals& v) { return const_cast<void*>(in.small(c, v)); };
  const jnorm::RowStats stats{pointer(power), pointer(center), pointer(offset), pointer(rstd)};
  const Array dy = in.add(c.other, c.dy);
  const Reals from_sum = !c.output && random() % 2 ? normal(random, shape.size(), type) : Reals();
  const Array dsum = from_sum.empty() ? Array() : in.add(type, from_sum);
  std::vector<Value> hat(shape.size()), g(shape.size()), dx(shape.size());
  std::vector<Sum> first(shape.O), second(shape.O), dscale(c.scale.size()), dbias(c.scale.size());
  c.each([&](int64_t o, int64_t r, int64_t, int64_t i) {
    const int64_t k = c.affine(o, r);
    const Real near = c.x[i] * power[o] - center[o];
    const bool usable = c.usable(o, r, i);
    Value z = usable ? inverted(c.act, c.x[i], u) : Value{0, 0};
    if (c.output) {
      if (usable && c.scale[k] != 0) hat[i] = times(plus(z, {-c.bias[k], 0}, u), 1 / c.scale[k], 2 * u);
    } else {
      if (usable) hat[i] = times(Value{near - offset[o], 2 * u * (std::fabs(near) + std::fabs(offset[o]))}, rstd[o], u);
      z = plus(times(hat[i], c.scale[k], u), {c.bias[k], 0}, u);
    }
    g[i] = times_slope(c.act, z, c.dy[i], u);
    dscale[k].add(times(g[i], hat[i], u));
    dbias[k].add(g[i]);
    const Value through = times(g[i], c.scale[k], u);
    first[o].add(through);
    second[o].add(times(through, hat[i], u));
  });
  c.each([&](int64_t o, int64_t r, int64_t, int64_t i) {
    const Real n = std::max(c.sets[o].n, 1.0L);
    if (c.usable(o, r, i)) dx[i] = times(g[i], c.scale[c.affine(o, r)], u);
    if (c.mask.counts(o, r, 0)) {
      const Value one = c.centered ? times(first[o].of(u), -1 / n, u) : Value{0, 0}, two = times(second[o].of(u), -1 / n, u);
      dx[i] = plus(dx[i], plus(one, times(hat[i], two, u), u), u);
    }
    dx[i] = times(dx[i], rstd[o] * power[o], 3 * u);
    if (dsum) dx[i] = plus(dx[i], {from_sum[i], 0}, u);
  });
  const Type a = c.arithmetic;
  test("row_cotangent of " + c.name + (dsum ? ", dsum" : ""),
       {{"dx", type, dx}, {"dscale", a, values_of(dscale, u)}, {"dbias", a, values_of(dbias, u)}},
       [&](Isa isa, jnorm::Pool& pool, std::vector<Array> out) {
         jnorm::row_cotangent(isa, pool, row, stats, dy, dsum, out[0], out[1].data, out[2].data);
       },
       random);
}

inline void test_rows(Random& random, const Shape& shape, Type type) {
  test_row_norm(random, shape, type);
  test_row_cotangent(random, shape, type);
}

}  // namespace driver

// Statistics over positions: columns, and groups of them.
#pragma once

#include "harness.h"

namespace driver {

// The operands of one call.
class Operands {
 public:
  explicit Operands(Random& random) : random_(random) {}
  Array add(Type type, const Reals& values) {
    tensors_.emplace_back(type, values, random_);
    return tensors_.back().array();
  }
  const void* small(const Case& c, const Reals& values) { return add(c.arithmetic, values).data; }

 private:
  Random& random_;
  std::vector<Tensor> tensors_;
};

inline std::vector<Value> exactly(const Reals& values) {
  std::vector<Value> v;
  for (Real x : values) v.push_back({x, 0});
  return v;
}

// ---- columns ----
struct ColumnCase : Case {
  Reals center, offset, shift, mul, add, a, b;
  ColumnCase(Random& random, const Shape& s, Type t, bool any_infinite) : Case(random, s, t, true, any_infinite) {
    auto draw = [&](Real mean, Real spread) { return normal(random, s.columns(), arithmetic, mean, spread); };
    center = draw(style == Style::far ? x.empty() ? 0 : x[0] : 0, 0.5L), offset = draw(0, 1e-3L), shift = draw(0, 0.1L);
    mul = draw(0, 1), add = draw(0, 0.5L), a = draw(0, 1), b = draw(0, 1);
  }
  // The center is 1 / mul then.
  void told_from_y(Random& random) {
    may_be_output(random);
    for (size_t k = 0; output && k < center.size(); k++) center[k] = mul[k] == 0 ? 0 : rounded(arithmetic, 1 / mul[k]);
  }
  Value xc(int64_t i, int64_t k, bool usable) const {
    if (output && usable) {
      const Value inner = times(plus(inverted(act, x[i], u), {-add[k], 0}, u), center[k], u);
      return plus(inner, {shift[k] - offset[k], u * std::fabs(shift[k] - offset[k])}, u);
    }
    const Real near = x[i] - center[k];
    return usable ? Value{near - offset[k], 2 * u * (std::fabs(near) + std::fabs(offset[k]))} : Value{0, 0};
  }
  Value z(int64_t i, int64_t k, bool usable) const {
    if (output) return inverted(act, x[i], u);
    const Real near = x[i] - center[k], inner = usable ? near - shift[k] : offset[k] - shift[k];
    const Real error = 2 * u * ((usable ? std::fabs(near) : std::fabs(offset[k])) + std::fabs(shift[k]));
    const Value mapped = plus(times(Value{inner, error}, mul[k], u), {add[k], 0}, u);
    return residual.empty() ? mapped : plus(mapped, {residual[i], 0}, u);
  }
  jnorm::Column column(Operands& in) const {
    const Array none;
    return {shape.O, shape.R, shape.C, in.add(type, x), residual.empty() ? none : in.add(other, residual), mask.mask,
            in.small(*this, center), in.small(*this, offset), in.small(*this, shift), in.small(*this, mul), in.small(*this, add), act,
            output};
  }
};

inline void test_moments(Random& random, const Shape& shape, Type type) {
  const Case c(random, shape, type, true, true);
  Operands in(random);
  const Array x = in.add(type, c.x);
  const std::vector<Moments> s = c.statistics(1);
  std::vector<Value> count, m2;
  for (const Moments& m : s) {
    count.push_back({m.n, 0});
    m2.push_back({m.m2, m.m2_error});
  }
  const Type a = c.arithmetic;
  test("moments of " + c.name, {{"count", a, count}, {"center", a, count, false}, {"offset", a, count, false}, {"m2", a, m2}},
       [&](Isa isa, jnorm::Pool& pool, std::vector<Array> out) {
         jnorm::moments(isa, pool, shape.O, shape.R, shape.C, x, c.mask.mask, out[0].data, out[1].data, out[2].data, out[3].data);
       },
       random, [&](const Results& out) { return mean_differs(s, 1, out[1], out[2]); });
}

inline void test_apply(Random& random, const Shape& shape, Type type) {
  const ColumnCase c(random, shape, type, true);
  Operands in(random);
  const jnorm::Column column = c.column(in);
  std::vector<Value> y(shape.size());
  c.each([&](int64_t o, int64_t r, int64_t k, int64_t i) {
    y[i] = activated(c.act, c.z(i, o * shape.C + k, c.usable(o, r, k, i)), c.u);
  });
  test("apply to " + c.name, {{"y", c.other, y}},
       [&](Isa isa, jnorm::Pool& pool, std::vector<Array> out) { jnorm::apply(isa, pool, column, out[0]); }, random);
}

inline void test_cotangents(Random& random, const Shape& shape, Type type) {
  ColumnCase c(random, shape, type, false);
  c.told_from_y(random);
  Operands in(random);
  const jnorm::Column column = c.column(in);
  const Array dy = in.add(c.other, c.dy);
  const void *a = in.small(c, c.a), *b = in.small(c, c.b);
  std::vector<Sum> first(shape.columns()), second(shape.columns());
  std::vector<Value> dx(shape.size()), dresidual(shape.size());
  c.each([&](int64_t o, int64_t r, int64_t channel, int64_t i) {
    const int64_t k = o * shape.C + channel;
    const bool usable = c.usable(o, r, channel, i);
    const Value xc = c.xc(i, k, usable), g = times_slope(c.act, c.z(i, k, usable), c.dy[i], c.u);
    first[k].add(g);
    second[k].add(times(g, xc, c.u));
    dresidual[i] = g;
    if (usable) dx[i] = times(g, c.mul[k], c.u);
    if (c.mask.counts(o, r, channel)) dx[i] = plus(dx[i], plus({c.a[k], 0}, times(xc, c.b[k], c.u), c.u), c.u);
  });
  const Type t = c.arithmetic;
  test("cotangent_sums of " + c.name, {{"first", t, values_of(first, c.u)}, {"second", t, values_of(second, c.u)}},
       [&](Isa isa, jnorm::Pool& pool, std::vector<Array> out) {
         jnorm::cotangent_sums(isa, pool, column, dy, out[0].data, out[1].data);
       },
       random);
  std::vector<Result> results{{"dx", type, dx}};
  if (column.residual) results.push_back({"dresidual", c.other, dresidual});
  test("cotangent_apply to " + c.name, results,
       [&](Isa isa, jnorm::Pool& pool, std::vector<Array> out) {
         jnorm::cotangent_apply(isa, pool, column, dy, a, b, out[0], column.residual ? out[1] : Array());
       },
       random);
}

inline void test_columns(Random& random, const Shape& shape, Type type) {
  test_moments(random, shape, type);
  test_apply(random, shape, type);
  test_cotangents(random, shape, type);
}

// ---- groups ----
struct GroupCase : Case {
  int64_t group;
  Real epsilon = 1e-5L;
  Reals scale, bias;
  std::vector<Moments> sets;
  GroupCase(Random& random, const Shape& s, Type t, bool any_infinite) : Case(random, s, t, true, any_infinite) {
    group = s.C % 4 == 0 && s.C ? one_of<int64_t>(random, {1, 4, s.C / 4, s.C}) : one_of<int64_t>(random, {1, std::max<int64_t>(1, s.C)});
    scale = normal(random, s.columns(), arithmetic, 1, 0.5L), bias = normal(random, s.columns(), arithmetic, 0, 0.5L);
    sets = statistics(group);
    name += ", groups of " + std::to_string(group);
  }
  jnorm::Group operands(Operands& in) const {
    return {shape.O, shape.R, shape.C, group, in.add(type, x), mask.mask, in.small(*this, scale), in.small(*this, bias), act,
            output};
  }
};

inline void test_group_norm(Random& random, const Shape& shape, Type type) {
  const GroupCase c(random, shape, type, true);
  Operands in(random);
  const jnorm::Group group = c.operands(in);
  std::vector<Value> y(shape.size()), rstd(shape.columns());
  for (int64_t k = 0; k < shape.columns(); k++) rstd[k] = rstd_of(c.sets[k / c.group], c.epsilon, c.u);
  c.each([&](int64_t o, int64_t r, int64_t channel, int64_t i) {
    const int64_t k = o * shape.C + channel;
    const Value hat = c.usable(o, r, channel, i) ? times(deviation(c.sets[k / c.group], c.x[i], c.u), rstd[k], c.u) : Value{0, 0};
    y[i] = activated(c.act, plus(times(hat, c.scale[k], c.u), {c.bias[k], 0}, c.u), c.u);
  });
  const Type a = c.arithmetic;
  test("group_norm of " + c.name, {{"y", c.other, y}, {"center", a, rstd, false}, {"offset", a, rstd, false}, {"rstd", a, rstd}},
       [&](Isa isa, jnorm::Pool& pool, std::vector<Array> out) {
         jnorm::group_norm(isa, pool, group, static_cast<double>(c.epsilon), out[0], out[1].data, out[2].data, out[3].data);
       },
       random, [&](const Results& out) { return mean_differs(c.sets, c.group, out[1], out[2]); });
}

inline void test_group_cotangent(Random& random, const Shape& shape, Type type) {
  GroupCase c(random, shape, type, false);
  c.may_be_output(random);
  Operands in(random);
  const jnorm::Group group = c.operands(in);
  Reals center, offset, rstd;
  for (int64_t k = 0; k < shape.columns(); k++) {
    const Moments& s = c.sets[k / c.group];
    center.push_back(rounded(c.arithmetic, s.mean));
    offset.push_back(rounded(c.arithmetic, s.mean - center[k]));
    rstd.push_back(rounded(c.arithmetic, rstd_of(s, c.epsilon, c.u).value));
  }
  const Array dy = in.add(c.other, c.dy);
  const void *to_center = in.small(c, center), *to_offset = in.small(c, offset), *to_rstd = in.small(c, rstd);
  std::vector<Value> hat(shape.size()), g(shape.size()), dx(shape.size());
  std::vector<Sum> dscale(shape.columns()), dbias(shape.columns()), first(c.sets.size()), second(c.sets.size());
  c.each([&](int64_t o, int64_t r, int64_t channel, int64_t i) {
    const int64_t k = o * shape.C + channel;
    const bool usable = c.usable(o, r, channel, i);
    const Real near = c.x[i] - center[k], mul = rstd[k] * c.scale[k];
    Value xc{near - offset[k], 2 * c.u * (std::fabs(near) + std::fabs(offset[k]))}, z = inverted(c.act, c.x[i], c.u);
    // mul is rounded, and 1 / mul.
    if (c.output) xc = mul == 0 ? Value{0, 0} : times(plus(z, {-c.bias[k], 0}, c.u), 1 / mul, 4 * c.u);
    if (usable) hat[i] = times(xc, rstd[k], c.u);
    if (!c.output) z = plus(times(hat[i], c.scale[k], 2 * c.u), {c.bias[k], 0}, c.u);
    g[i] = times_slope(c.act, z, c.dy[i], c.u);
    dscale[k].add(times(g[i], hat[i], c.u));
    dbias[k].add(g[i]);
    first[k / c.group].add(times(g[i], c.scale[k], c.u));
    second[k / c.group].add(times(times(g[i], hat[i], c.u), c.scale[k], c.u));
  });
  c.each([&](int64_t o, int64_t r, int64_t channel, int64_t i) {
    const int64_t k = o * shape.C + channel, set = k / c.group;
    const Real n = std::max(c.sets[set].n, 1.0L);
    if (c.usable(o, r, channel, i)) dx[i] = times(times(g[i], c.scale[k], c.u), rstd[k], 2 * c.u);
    if (!c.mask.counts(o, r, channel)) return;
    const Value a = times(first[set].of(c.u), -rstd[k] / n, 4 * c.u), b = times(second[set].of(c.u), -rstd[k] / n, 4 * c.u);
    dx[i] = plus(dx[i], plus(a, times(hat[i], b, 4 * c.u), c.u), c.u);
  });
  const Type t = c.arithmetic;
  test("group_cotangent of " + c.name, {{"dx", type, dx}, {"dscale", t, values_of(dscale, c.u)}, {"dbias", t, values_of(dbias, c.u)}},
       [&](Isa isa, jnorm::Pool& pool, std::vector<Array> out) {
         jnorm::group_cotangent(isa, pool, group, dy, to_center, to_offset, to_rstd, out[0], out[1].data, out[2].data);
       },
       random);
}

inline void test_group(Random& random, const Shape& shape, Type type) {
  test_group_norm(random, shape, type);
  test_group_cotangent(random, shape, type);
}

}  // namespace driver

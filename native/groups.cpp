// The group kernels on the pool: every sample is read from memory once, if the cache holds it.
#include "columns.h"

namespace jnorm {
namespace {

template <class A> class Groups {
 public:
  Groups(const Leaf& leaf, Pool& pool, const Group& in) : leaf_(leaf), pool_(pool), in_(in), cut_(in.O, in.R, in.C, in.x.type) {}

  void norm(double epsilon, Array y, A* center, A* offset, A* rstd) {
    const int64_t n = cut_.chunks_of_o();
    const bool stream = streams(cut_, y);
    std::vector<A> mul(in_.O * in_.C);
    Partials<A> partials(cut_, cut_.chunks());
    const Column column = operands(center, offset, mul.data(), false);
    each_sample(
        [&](int64_t i) { moments_chunk(leaf_, cut_, Place(cut_, i), in_.x, in_.mask, partials.of(i)); },
        [&](int64_t o) { combine(merged_moments(cut_, partials, o * n), o, epsilon, center, offset, rstd, mul.data()); },
        [&](int64_t i) { apply_chunk<A>(leaf_, cut_, Place(cut_, i), column, y, stream); });
  }

  void cotangent(Array dy, const A* center, const A* offset, const A* rstd, Array dx, A* dscale, A* dbias) {
    const int64_t size = in_.O * in_.R * in_.C, n = cut_.chunks_of_o();
    const bool stream = streams(cut_, dx, size * (size_of(in_.x.type) + size_of(dy.type)));
    std::vector<A> mul(in_.O * in_.C), a(in_.O * in_.C), b(in_.O * in_.C);
    std::vector<A> inverse(in_.output ? in_.O * in_.C : 0);
    for (int64_t i = 0; i < in_.O * in_.C; i++) {
      mul[i] = rstd[i] * scale(i);
      if (in_.output) inverse[i] = mul[i] == 0 ? A(0) : 1 / mul[i];
    }
    Partials<A> partials(cut_, cut_.chunks());
    const Column column = operands(in_.output ? inverse.data() : center, offset, mul.data(), in_.output);
    each_sample(
        [&](int64_t i) { sums_chunk<A>(leaf_, cut_, Place(cut_, i), column, dy, partials.of(i)); },
        [&](int64_t o) { back(merged_sums(cut_, partials, o * n), o, rstd, a.data(), b.data(), dscale, dbias); },
        [&](int64_t i) { cotangent_chunk<A>(leaf_, cut_, Place(cut_, i), column, dy, a.data(), b.data(), dx, {}, stream); });
  }

 private:
  A scale(int64_t i) const { return static_cast<const A*>(in_.scale)[i]; }

  Column operands(const A* center, const A* offset, const A* mul, bool output) const {
    return {in_.O, in_.R, in_.C, in_.x, {}, in_.mask, center, offset, offset, mul, in_.bias, in_.act, output};
  }

  // Chunk by chunk in the same order, whether a sample is one task or its chunks are.
  template <class First, class Between, class Second> void each_sample(First first, Between between, Second second) {
    const int64_t n = cut_.chunks_of_o();
    if (in_.O >= kWantedChunks || n == 1) {
      pool_.run(in_.O, [&](int64_t o) {
        for (int64_t k = 0; k < n; k++) first(o * n + k);
        between(o);
        for (int64_t k = n - 1; k >= 0; k--) second(o * n + k);
      });
    } else {
      pool_.run(in_.O * n, first);
      pool_.run(in_.O, between);
      pool_.run(in_.O * n, [&](int64_t i) { second(in_.O * n - 1 - i); });
    }
  }

  void combine(const Merged<A>& all, int64_t o, double epsilon, A* center, A* offset, A* rstd, A* mul) {
    for (int64_t g = 0; g < in_.C; g += in_.group) {
      Merged<A> group(1);
      for (int64_t c = g; c < g + in_.group; c++) group.add(0, all.count[c], all.mean[c], all.m2[c]);
      const Wide<A> n = group.count[0];
      const A var = clipped<A>(group.m2[0]) / A(n > 1 ? n : 1);
      const A total = var + A(epsilon);
      const A r = n > 0 && total != 0 ? A(1 / __builtin_sqrt(total)) : A(0);
      for (int64_t c = g; c < g + in_.group; c++) {
        const int64_t i = o * in_.C + c;
        center[i] = A(group.mean[0]);
        offset[i] = A(group.mean[0] - center[i]);
        rstd[i] = r;
        mul[i] = r * scale(i);
      }
    }
  }

  // The number of counted elements of a group.
  Wide<A> counted(int64_t o, int64_t g) const {
    if (!in_.mask.data) return Wide<A>(in_.R * in_.group);
    int64_t n = 0;
    const Mask& m = in_.mask;
    for (int64_t r = 0; r < (m.r ? in_.R : 1); r++) {
      for (int64_t c = g; c < g + (m.c ? in_.group : 1); c++) n += m.data[o * m.o + r * m.r + c * m.c] != 0;
    }
    return Wide<A>(n * (m.r ? 1 : in_.R) * (m.c ? 1 : in_.group));
  }

  void back(const Merged<A>& sums, int64_t o, const A* rstd, A* a, A* b, A* dscale, A* dbias) {
    for (int64_t g = 0; g < in_.C; g += in_.group) {
      Wide<A> first = 0, second = 0;
      const Wide<A> r = rstd[o * in_.C + g];
      for (int64_t c = g; c < g + in_.group; c++) {
        const int64_t i = o * in_.C + c;
        first += scale(i) * sums.mean[c];
        second += scale(i) * (sums.m2[c] * r);
        dscale[i] = A(sums.m2[c] * r);
        dbias[i] = A(sums.mean[c]);
      }
      const Wide<A> n = counted(o, g), divisor = n > 1 ? n : 1;
      for (int64_t c = g; c < g + in_.group; c++) {
        a[o * in_.C + c] = A(-r * (first / divisor));
        b[o * in_.C + c] = A(-r * (r * (second / divisor)));
      }
    }
  }

  const Leaf& leaf_;
  Pool& pool_;
  const Group& in_;
  const Cut cut_;
};

}  // namespace

void group_norm(Isa isa, Pool& pool, const Group& in, double epsilon, Array y, void* center, void* offset, void* rstd) {
  if (in.O * in.C == 0) return;
  auto run = [&](auto zero) {
    using A = decltype(zero);
    Groups<A>(leaf_of(isa), pool, in).norm(epsilon, y, static_cast<A*>(center), static_cast<A*>(offset), static_cast<A*>(rstd));
  };
  is_double(in.x.type) ? run(double()) : run(float());
}

void group_cotangent(Isa isa, Pool& pool, const Group& in, Array dy, const void* center, const void* offset, const void* rstd, Array dx,
                     void* dscale, void* dbias) {
  if (in.O * in.C == 0) return;
  auto run = [&](auto zero) {
    using A = decltype(zero);
    Groups<A>(leaf_of(isa), pool, in)
        .cotangent(dy, static_cast<const A*>(center), static_cast<const A*>(offset), static_cast<const A*>(rstd), dx,
                   static_cast<A*>(dscale), static_cast<A*>(dbias));
  };
  is_double(in.x.type) ? run(double()) : run(float());
}

}  // namespace jnorm

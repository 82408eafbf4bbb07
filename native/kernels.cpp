// What runs on the pool: the column kernels over chunks, and the merging of what the chunks found.
#include "kernels.h"

#include "chunks.h"
#include "dispatch.h"

namespace jnorm {

int64_t column_scratch(Type t, int64_t period) {
  const int64_t n = padded(period, lanes(t)), size = is_double(t) ? 8 : 4;
  return (6 * 1024 + 4 * n) * size + 3 * n * size * 2;
}

namespace {

template <class A> struct WideOf;
template <> struct WideOf<float> { using type = double; };
template <> struct WideOf<double> { using type = long double; };
template <class A> using Wide = typename WideOf<A>::type;

struct Smalls {
  const void *center = nullptr, *offset = nullptr, *shift = nullptr, *mul = nullptr, *add = nullptr, *a = nullptr, *b = nullptr;
};

// The small operands of one chunk, repeated to a period where that is longer than a row.
template <class A> class Periods {
 public:
  Periods(const Cut& cut, const Place& at, const Smalls& s, ColumnChunk& c) : memory_(cut.period > cut.C ? 7 * cut.period * sizeof(A) : 0) {
    const void* const from[] = {s.center, s.offset, s.shift, s.mul, s.add, s.a, s.b};
    const void** const to[] = {&c.center, &c.offset, &c.shift, &c.mul, &c.add, &c.a, &c.b};
    for (int i = 0; i < 7; i++) {
      *to[i] = from[i] ? period(cut, static_cast<const A*>(from[i]) + at.o * cut.C + at.column, i) : nullptr;
    }
  }

 private:
  const A* period(const Cut& cut, const A* from, int i) {
    if (cut.period == cut.C) return from;
    A* const to = static_cast<A*>(memory_.get()) + i * cut.period;
    for (int64_t j = 0; j < cut.period; j += cut.C) std::copy(from, from + cut.C, to + j);
    return to;
  }
  Scratch memory_;
};

ColumnChunk chunk_at(const Cut& cut, const Place& at, Array x, Mask mask) {
  ColumnChunk c{};
  c.rows = at.rows;
  c.C = at.width;
  c.stride = cut.C;
  c.period = cut.period > cut.C ? cut.period : at.width;
  c.x = {x.at((at.o * cut.R + at.row) * cut.C + at.column), x.type};
  if (mask.data) c.mask = {mask.data + at.o * mask.o + at.row * mask.r + at.column * mask.c, mask.o, mask.r, mask.c};
  return c;
}

Array at_place(const Cut& cut, const Place& at, Array a) {
  return {a.at((at.o * cut.R + at.row) * cut.C + at.column), a.type};
}

bool aligned(Array a) { return reinterpret_cast<uintptr_t>(a.data) % kVectorBytes == 0; }

// Whether to write past the caches: only whole aligned vectors can be.
bool streams(const Cut& cut, Array out, int64_t bytes_in) {
  const int64_t n = lanes(cut.type), bytes = cut.O * cut.R * cut.C * size_of(out.type);
  return bytes + bytes_in > last_cache_bytes() && aligned(out) && cut.C % n == 0 && cut.width % n == 0;
}

// --- one chunk ----------------------------------------------------------------------------------------------------------------------

// What each chunk found, one value a channel.
template <class A> struct Partials {
  std::vector<Wide<A>> values;
  int64_t chunk;  // values of one chunk
  Partials(const Cut& cut, int64_t chunks) : chunk(3 * cut.widest()) { values.resize(chunks * chunk); }
  Wide<A>* at(int64_t i, int which) { return values.data() + i * chunk + which * (chunk / 3); }
  Partial of(int64_t i) { return {at(i, 0), at(i, 1), at(i, 2)}; }
};

void moments_chunk(const Leaf& leaf, const Cut& cut, const Place& at, Array x, Mask mask, const Partial& to) {
  const Scratch scratch(column_scratch(x.type, cut.longest_period()));
  ColumnChunk c = chunk_at(cut, at, x, mask);
  c.scratch = scratch.get();
  leaf.moments(c, to);
}

template <class A> ColumnChunk with_operands(const Cut& cut, const Place& at, const Column& in, void* scratch) {
  ColumnChunk c = chunk_at(cut, at, in.x, in.mask);
  c.residual = at_place(cut, at, in.residual);
  c.act = in.act;
  c.scratch = scratch;
  return c;
}

Smalls smalls(const Column& in) { return {in.center, in.offset, in.shift, in.mul, in.add}; }

template <class A> void apply_chunk(const Leaf& leaf, const Cut& cut, const Place& at, const Column& in, Array y, bool stream) {
  const Scratch scratch(column_scratch(in.x.type, cut.longest_period()));
  ColumnChunk c = with_operands<A>(cut, at, in, scratch.get());
  const Periods<A> periods(cut, at, smalls(in), c);
  c.y = at_place(cut, at, y);
  c.stream = stream;
  leaf.apply(c);
}

template <class A> void sums_chunk(const Leaf& leaf, const Cut& cut, const Place& at, const Column& in, Array dy, const Partial& to) {
  const Scratch scratch(column_scratch(in.x.type, cut.longest_period()));
  ColumnChunk c = with_operands<A>(cut, at, in, scratch.get());
  const Periods<A> periods(cut, at, smalls(in), c);
  c.dy = at_place(cut, at, dy);
  leaf.cotangent_sums(c, to);
}

template <class A>
void cotangent_chunk(const Leaf& leaf, const Cut& cut, const Place& at, const Column& in, Array dy, const void* a, const void* b, Array dx,
                     Array dresidual, bool stream) {
  const Scratch scratch(column_scratch(in.x.type, cut.longest_period()));
  ColumnChunk c = with_operands<A>(cut, at, in, scratch.get());
  Smalls s = smalls(in);
  s.a = a;
  s.b = b;
  const Periods<A> periods(cut, at, s, c);
  c.dy = at_place(cut, at, dy);
  c.dx = at_place(cut, at, dx);
  c.dresidual = at_place(cut, at, dresidual);
  c.stream = stream;
  leaf.cotangent_apply(c);
}

// --- merging ------------------------------------------------------------------------------------------------------------------------

template <class A> struct Merged {
  std::vector<Wide<A>> count, mean, m2;
  explicit Merged(int64_t n) : count(n), mean(n), m2(n) {}
  // Chan, Golub, LeVeque.
  void add(int64_t i, Wide<A> n, Wide<A> m, Wide<A> square) {
    if (n == 0) return;
    const Wide<A> all = count[i] + n, delta = m - mean[i], part = n / all;
    mean[i] = count[i] == 0 ? m : mean[i] + delta * part;
    m2[i] += square + delta * delta * (count[i] * part);
    count[i] = all;
  }
};

// The chunks of one o, from number `first` of the partials on.
template <class A> Merged<A> merged_moments(const Cut& cut, Partials<A>& partials, int64_t first) {
  Merged<A> to(cut.C);
  for (int64_t k = 0; k < cut.chunks_of_o(); k++) {
    const Place at(cut, k);
    const Wide<A>*const n = partials.at(first + k, 0), *const mean = partials.at(first + k, 1), *const m2 = partials.at(first + k, 2);
    for (int64_t c = 0; c < at.width; c++) to.add(at.column + c, n[c], mean[c], m2[c]);
  }
  return to;
}

template <class A> Merged<A> merged_sums(const Cut& cut, Partials<A>& partials, int64_t first) {
  Merged<A> to(cut.C);  // the sums in place of mean and m2
  for (int64_t k = 0; k < cut.chunks_of_o(); k++) {
    const Place at(cut, k);
    const Wide<A>*const one = partials.at(first + k, 1), *const two = partials.at(first + k, 2);
    for (int64_t c = 0; c < at.width; c++) to.mean[at.column + c] += one[c], to.m2[at.column + c] += two[c];
  }
  return to;
}

template <class A> A clipped(Wide<A> m2) {
  constexpr A most = sizeof(A) == 4 ? A(3.40282346638528859811704183484516925e+38) : A(1.79769313486231570814527423731704357e+308);
  return m2 > most ? most : A(m2);
}

// --- the ops ------------------------------------------------------------------------------------------------------------------------

template <class A>
void moments_of(const Leaf& leaf, Pool& pool, const Cut& cut, Array x, Mask mask, A* count, A* center, A* offset, A* m2) {
  Partials<A> partials(cut, cut.chunks());
  pool.run(cut.chunks(), [&](int64_t i) { moments_chunk(leaf, cut, Place(cut, i), x, mask, partials.of(i)); });
  for (int64_t o = 0; o < cut.O; o++) {
    const Merged<A> all = merged_moments(cut, partials, o * cut.chunks_of_o());
    for (int64_t c = 0; c < cut.C; c++) {
      const int64_t i = o * cut.C + c;
      count[i] = A(all.count[c]);
      center[i] = A(all.mean[c]);
      offset[i] = A(all.mean[c] - center[i]);
      m2[i] = clipped<A>(all.m2[c]);
    }
  }
}

template <class A> void apply_of(const Leaf& leaf, Pool& pool, const Column& in, Array y) {
  const Cut cut(in.O, in.R, in.C, in.x.type);
  const int64_t size = in.O * in.R * in.C;
  const bool stream = streams(cut, y, size * (size_of(in.x.type) + (in.residual ? size_of(in.residual.type) : 0)));
  // From the end, of which most is still in the caches.
  pool.run(cut.chunks(), [&](int64_t i) { apply_chunk<A>(leaf, cut, Place(cut, cut.chunks() - 1 - i), in, y, stream); });
}

template <class A> void sums_of(const Leaf& leaf, Pool& pool, const Column& in, Array dy, A* first, A* second) {
  const Cut cut(in.O, in.R, in.C, in.x.type);
  Partials<A> partials(cut, cut.chunks());
  pool.run(cut.chunks(), [&](int64_t i) { sums_chunk<A>(leaf, cut, Place(cut, i), in, dy, partials.of(i)); });
  for (int64_t o = 0; o < cut.O; o++) {
    const Merged<A> all = merged_sums(cut, partials, o * cut.chunks_of_o());
    for (int64_t c = 0; c < cut.C; c++) first[o * cut.C + c] = A(all.mean[c]), second[o * cut.C + c] = A(all.m2[c]);
  }
}

template <class A>
void cotangent_of(const Leaf& leaf, Pool& pool, const Column& in, Array dy, const void* a, const void* b, Array dx, Array dresidual) {
  const Cut cut(in.O, in.R, in.C, in.x.type);
  const int64_t size = in.O * in.R * in.C;
  const bool stream = streams(cut, dx, size * (size_of(in.x.type) + size_of(dy.type))) && (!dresidual || aligned(dresidual));
  pool.run(cut.chunks(),
           [&](int64_t i) { cotangent_chunk<A>(leaf, cut, Place(cut, cut.chunks() - 1 - i), in, dy, a, b, dx, dresidual, stream); });
}

// --- groups: every sample is read from memory once, if the cache holds it -------------------------------------------------------------

template <class A> class Groups {
 public:
  Groups(const Leaf& leaf, Pool& pool, const Group& in) : leaf_(leaf), pool_(pool), in_(in), cut_(in.O, in.R, in.C, in.x.type) {}

  void norm(double epsilon, Array y, A* center, A* offset, A* rstd) {
    const int64_t size = in_.O * in_.R * in_.C, n = cut_.chunks_of_o();
    const bool stream = streams(cut_, y, size * size_of(in_.x.type));
    std::vector<A> mul(in_.O * in_.C);
    Partials<A> partials(cut_, cut_.chunks());
    const Column column = operands(center, offset, mul.data());
    each_sample(
        [&](int64_t i) { moments_chunk(leaf_, cut_, Place(cut_, i), in_.x, in_.mask, partials.of(i)); },
        [&](int64_t o) { combine(merged_moments(cut_, partials, o * n), o, epsilon, center, offset, rstd, mul.data()); },
        [&](int64_t i) { apply_chunk<A>(leaf_, cut_, Place(cut_, i), column, y, stream); });
  }

  void cotangent(Array dy, const A* center, const A* offset, const A* rstd, Array dx, A* dscale, A* dbias) {
    const int64_t size = in_.O * in_.R * in_.C, n = cut_.chunks_of_o();
    const bool stream = streams(cut_, dx, size * (size_of(in_.x.type) + size_of(dy.type)));
    std::vector<A> mul(in_.O * in_.C), a(in_.O * in_.C), b(in_.O * in_.C);
    for (int64_t i = 0; i < in_.O * in_.C; i++) mul[i] = rstd[i] * scale(i);
    Partials<A> partials(cut_, cut_.chunks());
    const Column column = operands(center, offset, mul.data());
    each_sample(
        [&](int64_t i) { sums_chunk<A>(leaf_, cut_, Place(cut_, i), column, dy, partials.of(i)); },
        [&](int64_t o) { back(merged_sums(cut_, partials, o * n), o, rstd, a.data(), b.data(), dscale, dbias); },
        [&](int64_t i) { cotangent_chunk<A>(leaf_, cut_, Place(cut_, i), column, dy, a.data(), b.data(), dx, {}, stream); });
  }

 private:
  A scale(int64_t i) const { return static_cast<const A*>(in_.scale)[i]; }

  Column operands(const A* center, const A* offset, const A* mul) const {
    return {in_.O, in_.R, in_.C, in_.x, {}, in_.mask, center, offset, offset, mul, in_.bias, in_.act};
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

void moments(Isa isa, Pool& pool, int64_t O, int64_t R, int64_t C, Array x, Mask mask, void* count, void* center, void* offset, void* m2) {
  if (O * C == 0) return;
  const Cut cut(O, R, C, x.type);
  auto run = [&](auto zero) {
    using A = decltype(zero);
    moments_of<A>(leaf_of(isa), pool, cut, x, mask, static_cast<A*>(count), static_cast<A*>(center), static_cast<A*>(offset),
                  static_cast<A*>(m2));
  };
  is_double(x.type) ? run(double()) : run(float());
}

void apply(Isa isa, Pool& pool, const Column& in, Array y) {
  if (in.O * in.R * in.C == 0) return;
  is_double(in.x.type) ? apply_of<double>(leaf_of(isa), pool, in, y) : apply_of<float>(leaf_of(isa), pool, in, y);
}

void cotangent_sums(Isa isa, Pool& pool, const Column& in, Array dy, void* first, void* second) {
  if (in.O * in.C == 0) return;
  auto run = [&](auto zero) {
    using A = decltype(zero);
    sums_of<A>(leaf_of(isa), pool, in, dy, static_cast<A*>(first), static_cast<A*>(second));
  };
  is_double(in.x.type) ? run(double()) : run(float());
}

void cotangent_apply(Isa isa, Pool& pool, const Column& in, Array dy, const void* a, const void* b, Array dx, Array dresidual) {
  if (in.O * in.R * in.C == 0) return;
  is_double(in.x.type) ? cotangent_of<double>(leaf_of(isa), pool, in, dy, a, b, dx, dresidual)
                       : cotangent_of<float>(leaf_of(isa), pool, in, dy, a, b, dx, dresidual);
}

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

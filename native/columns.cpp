// The column kernels on the pool.
#include "columns.h"

namespace jnorm {

int64_t column_scratch(Type t, int64_t period) {
  const int64_t n = padded(period, lanes(t)), size = is_double(t) ? 8 : 4;
  return (6 * 1024 + 4 * n) * size + 3 * n * size * 2;
}

namespace {

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
  const bool stream = streams(cut, y);
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

}  // namespace jnorm

// One chunk of [O, R, C] for the kernels of an instruction set, and the merging of what the chunks found.
#pragma once

#include "chunks.h"
#include "dispatch.h"

namespace jnorm {

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

inline Array at_place(const Cut& cut, const Place& at, Array a) {
  return {a.at((at.o * cut.R + at.row) * cut.C + at.column), a.type};
}

inline ColumnChunk chunk_at(const Cut& cut, const Place& at, Array x, Mask mask) {
  ColumnChunk c{};
  c.rows = at.rows;
  c.C = at.width;
  c.stride = cut.C;
  c.period = cut.period > cut.C ? cut.period : at.width;
  c.x = at_place(cut, at, x);
  if (mask.data) c.mask = {mask.data + at.o * mask.o + at.row * mask.r + at.column * mask.c, mask.o, mask.r, mask.c};
  return c;
}

// Whether to write past the caches, which only whole aligned vectors can be: what fills the last cache, alone or with what is read for it
// and not again. y is read by what follows, and x once more by the backward pass; dx is written when x and dy are done with.
inline bool streams(const Cut& cut, Array out, int64_t bytes_in = 0) {
  const int64_t n = lanes(cut.type), bytes = cut.O * cut.R * cut.C * size_of(out.type);
  return bytes + bytes_in >= last_cache_bytes() && aligned(out) && cut.C % n == 0 && cut.width % n == 0;
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

inline void moments_chunk(const Leaf& leaf, const Cut& cut, const Place& at, Array x, Mask mask, const Partial& to) {
  const Scratch scratch(column_scratch(x.type, cut.longest_period()));
  ColumnChunk c = chunk_at(cut, at, x, mask);
  c.scratch = scratch.get();
  leaf.moments(c, to);
}

inline ColumnChunk with_operands(const Cut& cut, const Place& at, const Column& in, void* scratch) {
  ColumnChunk c = chunk_at(cut, at, in.x, in.mask);
  c.residual = at_place(cut, at, in.residual);
  c.act = in.act;
  c.output = in.output;
  c.scratch = scratch;
  return c;
}

inline Smalls smalls(const Column& in) { return {in.center, in.offset, in.shift, in.mul, in.add}; }

template <class A> void apply_chunk(const Leaf& leaf, const Cut& cut, const Place& at, const Column& in, Array y, bool stream) {
  const Scratch scratch(column_scratch(in.x.type, cut.longest_period()));
  ColumnChunk c = with_operands(cut, at, in, scratch.get());
  const Periods<A> periods(cut, at, smalls(in), c);
  c.y = at_place(cut, at, y);
  c.stream = stream;
  leaf.apply(c);
}

template <class A> void sums_chunk(const Leaf& leaf, const Cut& cut, const Place& at, const Column& in, Array dy, const Partial& to) {
  const Scratch scratch(column_scratch(in.x.type, cut.longest_period()));
  ColumnChunk c = with_operands(cut, at, in, scratch.get());
  const Periods<A> periods(cut, at, smalls(in), c);
  c.dy = at_place(cut, at, dy);
  leaf.cotangent_sums(c, to);
}

template <class A>
void cotangent_chunk(const Leaf& leaf, const Cut& cut, const Place& at, const Column& in, Array dy, const void* a, const void* b, Array dx,
                     Array dresidual, bool stream) {
  const Scratch scratch(column_scratch(in.x.type, cut.longest_period()));
  ColumnChunk c = with_operands(cut, at, in, scratch.get());
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

}  // namespace jnorm

// How the work is cut: by the shape alone, never by the number of threads.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <vector>

#include "leaf.h"

namespace jnorm {

constexpr int64_t kChunkBytes = 256 << 10;
constexpr int64_t kMostChunks = 256;
// Below this many bytes of x a single thread is done before others would have started.
constexpr int64_t kSerialBytes = 32 << 10;
// A period is made of several rows up to this many elements; a row that is longer ends in an overlapping vector.
constexpr int64_t kLongestPeriod = 2048;
constexpr int64_t kWidestTile = 4096;
constexpr int64_t kNarrowestTile = 128;
constexpr int64_t kWantedChunks = 16;

// What does not fit the last cache is written past it.
inline int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const int64_t found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#else
    const int64_t found = 0;
#endif
    return found > 0 ? found : int64_t(32) << 20;
  }();
  return bytes;
}

// What sums are added up in.
template <class A> struct WideOf;
template <> struct WideOf<float> { using type = double; };
template <> struct WideOf<double> { using type = long double; };
template <class A> using Wide = typename WideOf<A>::type;

inline bool aligned(Array a) { return reinterpret_cast<uintptr_t>(a.data) % kVectorBytes == 0; }

// Memory that is not filled, aligned to a vector.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : p_(std::aligned_alloc(kVectorBytes, padded(std::max<int64_t>(bytes, 1), kVectorBytes))) {}
  ~Scratch() { std::free(p_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return p_; }

 private:
  void* p_;
};

// [O, R, C] as chunks of rows and, where there are few rows and many columns, of columns.
struct Cut {
  int64_t O, R, C, period, rows, row_chunks, width, column_chunks;
  Type type;

  Cut(int64_t O, int64_t R, int64_t C, Type x) : O(O), R(R), C(C), type(x) {
    const int64_t n = lanes(x), repeats = n / std::gcd(C, n), bytes = size_of(x) * C;
    period = repeats * C <= kLongestPeriod ? repeats * C : C;
    const int64_t in_period = period / C;
    rows = std::max({kChunkBytes / std::max<int64_t>(bytes, 1), kBlockRows, (O * R + kMostChunks - 1) / kMostChunks});
    if (O * R * bytes <= kSerialBytes) rows = std::max<int64_t>(R, 1);
    rows = padded(std::min(rows, std::max<int64_t>(R, 1)), in_period);
    row_chunks = std::max<int64_t>((R + rows - 1) / rows, 1);
    width = C;
    column_chunks = 1;
    if (in_period > 1 || C < 2 * kNarrowestTile) return;
    const int64_t wanted = O * row_chunks >= kWantedChunks || O * R * bytes <= kSerialBytes ? 1 : kWantedChunks / (O * row_chunks);
    const int64_t tiles = std::max(std::min(wanted, C / kNarrowestTile), (C + kWidestTile - 1) / kWidestTile);
    width = padded((C + tiles - 1) / tiles, 64);
    // A last tile of less than a vector joins the one before it.
    column_chunks = std::max<int64_t>((C + width - 1) / width, 1);
    if (column_chunks > 1 && C - (column_chunks - 1) * width < 16) column_chunks--;
  }
  int64_t chunks_of_o() const { return row_chunks * column_chunks; }
  int64_t chunks() const { return O * chunks_of_o(); }
  int64_t widest() const { return column_chunks == 1 ? C : width + 16; }
  int64_t longest_period() const { return period > C ? period : widest(); }
};

// One chunk of a cut.
struct Place {
  int64_t o, row, rows, column, width;
  Place(const Cut& cut, int64_t chunk) {
    o = chunk / cut.chunks_of_o();
    const int64_t in_o = chunk % cut.chunks_of_o(), r = in_o / cut.column_chunks, c = in_o % cut.column_chunks;
    row = r * cut.rows;
    rows = std::min(cut.rows, cut.R - row);
    column = c * cut.width;
    width = c == cut.column_chunks - 1 ? cut.C - column : cut.width;
  }
};

}  // namespace jnorm

// What is compiled once for each instruction set: functions over one chunk, without allocation and without the standard library's templates,
// whose code the linker would share between instruction sets.
#pragma once

#include "kernels.h"

namespace jnorm {

// Rows of x, of C elements each and `stride` apart, of one o. Small operands are periods: of `period` elements, a multiple of C; more than
// one row makes a period only where rows lie one after the other.
struct ColumnChunk {
  int64_t rows, C, stride, period;
  Array x, residual, y, dy, dx, dresidual;
  Mask mask;
  const void *center, *offset, *shift, *mul, *add, *a, *b;
  Act act;
  bool output;  // x is y
  bool stream;  // write past the caches
  void* scratch;
};

// Wide: double for float, long double for double. One value for each channel.
struct Partial {
  void *count, *mean, *m2;  // or in place of mean and m2: first, second
};

struct RowChunk {
  int64_t first, last, g;  // rows number first to last - 1 of those that take row g of scale and bias
  double epsilon;
  Array residual, y, sum, dy, dsum, dx;
  RowStats stats;
  bool stream;
  void *dscale, *dbias;  // Wide [R], added to
  void* scratch;
};

struct Leaf {
  void (*moments)(const ColumnChunk&, const Partial&);
  void (*apply)(const ColumnChunk&);
  void (*cotangent_sums)(const ColumnChunk&, const Partial&);
  void (*cotangent_apply)(const ColumnChunk&);
  void (*row_norm)(const Row&, const RowChunk&);
  void (*row_cotangent)(const Row&, const RowChunk&);
};

namespace baseline { extern const Leaf leaf; }
#ifdef JNORM_HAVE_AVX2
namespace avx2 { extern const Leaf leaf; }
#endif
#ifdef JNORM_HAVE_AVX512
namespace avx512 { extern const Leaf leaf; }
#endif
#ifdef JNORM_HAVE_AVX512_BF16
namespace avx512_bf16 { extern const Leaf leaf; }
#endif

// Vectors are 64 bytes on every machine, so that all cut the work alike.
inline constexpr int64_t kVectorBytes = 64;
// Rows whose sums are taken in the arithmetic's type, before they are added up in the wider one.
inline constexpr int64_t kBlockRows = 128;
inline constexpr int64_t kRowBlock = 64;

inline bool is_double(Type t) { return t == Type::f64; }
inline int64_t lanes(Type t) { return kVectorBytes / (is_double(t) ? 8 : 4); }
inline int64_t padded(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Bytes of scratch that a chunk needs.
int64_t column_scratch(Type t, int64_t period);
int64_t row_scratch(Type t, int64_t R);
// Rows of scratch memory that the row kernels use, from 0 on.
inline constexpr int64_t kRowScratch = 13;

}  // namespace jnorm

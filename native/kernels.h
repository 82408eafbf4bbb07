// Normalization kernels for the CPU: statistics of x, a map of them applied to x, and what the backward pass needs.
//
// x is [O, R, C] (statistics over R, for each o and c) or [O, R] (rows, statistics over R for each o). Small operands and results are of the
// arithmetic's type: float for float, bfloat16 and float16 storage, double for double. How the work is cut depends on the shape only, so that
// results do not depend on the number of threads. Nothing here knows of XLA.
#pragma once

#include <cstdint>
#include <functional>

namespace jnorm {

enum class Type : int { f32, f64, bf16, f16 };
enum class Act : int { none, relu, leaky_relu, silu, gelu };
// avx512_bf16: with instructions that round to bfloat16.
enum class Isa : int { baseline, avx2, avx512, avx512_bf16 };

inline int64_t size_of(Type t) { return t == Type::f64 ? 8 : t == Type::f32 ? 4 : 2; }

// Runs task(0) ... task(n - 1), each once, in any order and on any threads, and returns when all are done.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual void run(int64_t n, const std::function<void(int64_t)>& task) = 0;
};

// No data: there is none.
struct Array {
  void* data = nullptr;
  Type type = Type::f32;
  explicit operator bool() const { return data != nullptr; }
  void* at(int64_t i) const { return data ? static_cast<char*>(data) + i * size_of(type) : nullptr; }
};

// One byte an element, with the distances between neighbors along O, R and C: 0 where it is constant.
struct Mask {
  const uint8_t* data = nullptr;
  int64_t o = 0, r = 0, c = 0;
};

// The instruction sets that this library was built for and this machine has; the best of them unless chosen.
bool available(Isa isa);
Isa best_isa();

// z = ((x - center) - shift)·mul + add + residual, and xc = (x - center) - offset. Small operands are [O, C].
// With `output`, which `apply` does not take, x is y = act(z), center is 1 / mul, and there is no residual: z comes from y, xc from z. The
// activation is none or leaky_relu.
struct Column {
  int64_t O, R, C;
  Array x, residual;
  Mask mask;
  const void *center, *offset, *shift, *mul, *add;
  Act act;
  bool output;
};

// count, center, offset, m2: [O, C].
void moments(Isa, Pool&, int64_t O, int64_t R, int64_t C, Array x, Mask mask, void* count, void* center, void* offset, void* m2);
// y = act(z).
void apply(Isa, Pool&, const Column&, Array y);
// With g = act'(z)·dy: first = Σg, second = Σg·xc, [O, C].
void cotangent_sums(Isa, Pool&, const Column&, Array dy, void* first, void* second);
// dx = mul·g + a + b·xc, dresidual = g; a and b are [O, C].
void cotangent_apply(Isa, Pool&, const Column&, Array dy, const void* a, const void* b, Array dx, Array dresidual);

// y = act((x - mean)·rstd·scale + bias), with statistics over R and each `group` neighboring channels. scale and bias are [O, C];
// center, offset and rstd are [O, C], the same for all channels of a group.
// With `output`, which `group_norm` does not take, x is y, as above.
struct Group {
  int64_t O, R, C, group;
  Array x;
  Mask mask;
  const void *scale, *bias;
  Act act;
  bool output;
};
void group_norm(Isa, Pool&, const Group&, double epsilon, Array y, void* center, void* offset, void* rstd);
// dscale and dbias are [O, C].
void group_cotangent(Isa, Pool&, const Group&, Array dy, const void* center, const void* offset, const void* rstd, Array dx, void* dscale,
                     void* dbias);

// y = act(xhat·scale + bias), xhat = ((power·h - center) - offset)·rstd, h = x + residual, with statistics along each row. Row o takes the
// row (o / inner) % G of scale and bias, [G, R]. With `centered` false center and offset are 0. The mask has o and r.
struct Row {
  int64_t O, R, G, inner;
  Array x;
  Mask mask;
  const void *scale, *bias;
  Act act;
  bool centered;
  bool output;  // x is y, as above: for row_cotangent, without dsum
};
struct RowStats {
  void *power, *center, *offset, *rstd;  // [O]
};
void row_norm(Isa, Pool&, const Row&, double epsilon, Array residual, Array y, Array sum, const RowStats&);
// Row.x is h, the sum. dx = rstd·power·(g - Σg/n - xhat·Σ(g·xhat)/n) + dsum, with g = act'·dy·scale; dscale and dbias are [G, R].
void row_cotangent(Isa, Pool&, const Row&, const RowStats&, Array dy, Array dsum, Array dx, void* dscale, void* dbias);

}  // namespace jnorm

// Runs a kernel on every instruction set of this machine and with one to eight threads, and looks at what it wrote; and what it is run on.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>

#include "reference.h"

namespace driver {

using namespace reference;
using jnorm::Array;
using jnorm::Isa;
using jnorm::Mask;
using jnorm::size_of;

using Random = std::mt19937_64;
using Bytes = std::vector<uint8_t>;

inline constexpr int kThreads[] = {1, 2, 3, 8};
inline const char* const kIsas[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
inline const char* const kTypes[] = {"f32", "f64", "bf16", "f16"};
inline const char* const kActs[] = {"none", "relu", "leaky_relu", "silu", "gelu"};
inline int failures = 0;
inline int64_t runs = 0;

inline void fail(const std::string& what) {
  std::printf("FAILED %s\n", what.c_str());
  if (++failures >= 20) std::exit(1);
}

class RandomPool : public jnorm::Pool {
 public:
  RandomPool(int threads, uint64_t seed) : threads_(threads), random_(seed) {}
  void run(int64_t n, const std::function<void(int64_t)>& task) override {
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    std::atomic<int64_t> next{0};
    auto work = [&] {
      for (int64_t i; (i = next++) < n;) task(order[i]);
    };
    std::vector<std::thread> others;
    for (int t = 1; t < threads_; t++) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
  }

 private:
  int threads_;
  Random random_;
};

// Elements in memory that ends where they end, and starts at any multiple of their size.
class Tensor {
 public:
  // An operand.
  Tensor(Type type, const Reals& values, Random& random) : Tensor(type, static_cast<int64_t>(values.size()), random() % 5, 0) {
    for (int64_t i = 0; i < size_; i++) put(type, data(), i, values[i]);
  }
  // A result: what is around it must not change, and what is in it must.
  Tensor(Type type, int64_t size, Random& random) : Tensor(type, size, random() % 5, 64) { std::memset(memory_.get(), 0xa5, bytes_); }

  Array array() { return {data(), type_}; }
  Real at(int64_t i) const { return get(type_, memory_.get() + before_, i); }
  bool same_as(const Tensor& other) const {
    return !std::memcmp(memory_.get() + before_, other.memory_.get() + other.before_, size_ * size_of(type_));
  }
  bool intact() const {
    for (int64_t i = 0; i < bytes_; i++) {
      const bool inside = i >= before_ && i < before_ + size_ * size_of(type_);
      if (!inside && static_cast<uint8_t>(memory_[i]) != 0xa5) return false;
    }
    return true;
  }
  Type type() const { return type_; }
  int64_t size() const { return size_; }

 private:
  Tensor(Type type, int64_t size, int64_t shift, int64_t guard)
      : type_(type), size_(size), before_(guard + shift * size_of(type)), bytes_(before_ + size * size_of(type) + guard),
        memory_(new char[bytes_ + !bytes_]) {}
  char* data() { return memory_.get() + before_; }

  Type type_;
  int64_t size_, before_, bytes_;
  std::unique_ptr<char[]> memory_;
};

// One result of a kernel: what it should be, or a check of its own (then `expected` gives the size alone).
struct Result {
  const char* name;
  Type type;
  std::vector<Value> expected;
  bool compared = true;
};
using Results = std::vector<Tensor>;
using Kernel = std::function<void(Isa, jnorm::Pool&, std::vector<Array>)>;
using Check = std::function<std::string(const Results&)>;

inline Results run_once(const Kernel& kernel, const std::vector<Result>& results, Isa isa, int threads, uint64_t seed) {
  Random random(seed);
  Results out;
  for (const Result& r : results) out.emplace_back(r.type, static_cast<int64_t>(r.expected.size()), random);
  std::vector<Array> arrays;
  for (Tensor& t : out) arrays.push_back(t.array());
  RandomPool pool(threads, seed);
  kernel(isa, pool, arrays);
  runs++;
  return out;
}

inline std::string difference(const Result& r, const Tensor& got) {
  for (int64_t i = 0; i < got.size() && r.compared; i++) {
    if (agrees(r.type, got.at(i), r.expected[i])) continue;
    char text[200];
    std::snprintf(text, sizeof text, "%s[%lld] is %.12Lg, not %.12Lg +- %.3Lg", r.name, static_cast<long long>(i), got.at(i),
                  r.expected[i].value, r.expected[i].error);
    return text;
  }
  return got.intact() ? "" : std::string("bytes around ") + r.name + " were written to";
}

inline void test(const std::string& what, const std::vector<Result>& results, const Kernel& kernel, Random& random,
                 const Check& check = nullptr) {
  for (int i = 0; i < 4; i++) {
    const Isa isa = static_cast<Isa>(i);
    if (!jnorm::available(isa)) continue;
    const std::string where = what + " on " + kIsas[i];
    const Results one = run_once(kernel, results, isa, 1, random());
    std::string wrong;
    for (size_t k = 0; k < results.size() && wrong.empty(); k++) wrong = difference(results[k], one[k]);
    if (wrong.empty() && check) wrong = check(one);
    if (!wrong.empty()) fail(where + ": " + wrong);
    for (int threads : kThreads) {
      const Results more = run_once(kernel, results, isa, threads, random());
      for (size_t k = 0; k < results.size(); k++) {
        if (!more[k].same_as(one[k])) fail(where + ": " + results[k].name + " differs with " + std::to_string(threads) + " threads");
        if (!more[k].intact()) fail(where + ": bytes around " + results[k].name + " were written to");
      }
    }
  }
}

// center + offset is the mean of `group` neighboring columns; of nothing it is 0.
inline std::string mean_differs(const std::vector<Moments>& sets, int64_t group, const Tensor& center, const Tensor& offset) {
  for (int64_t k = 0; k < center.size(); k++) {
    const Moments& s = sets[k / group];
    const Real got = center.at(k) + offset.at(k);
    if (std::isfinite(s.mean) ? std::fabs(got - s.mean) <= s.mean_error : !std::isfinite(got)) continue;
    char text[120];
    std::snprintf(text, sizeof text, "mean[%lld] is %.15Lg, not %.15Lg +- %.3Lg", static_cast<long long>(k), got, s.mean, s.mean_error);
    return text;
  }
  return "";
}

// ---- what the kernels are run on ----
struct Shape {
  int64_t O, R, C;
  int64_t size() const { return O * R * C; }
  int64_t columns() const { return O * C; }
};
// far_first: what a mean is first looked for near is no such place.
enum class Style { plain, far, far_first, uncounted_infinite, infinite };

template <class T> T one_of(Random& random, std::initializer_list<T> of) { return of.begin()[random() % of.size()]; }

inline Reals normal(Random& random, int64_t n, Type type, Real mean = 0, Real spread = 1) {
  std::normal_distribution<double> draw;
  Reals v(n);
  for (Real& x : v) x = rounded(type, mean + spread * draw(random));
  return v;
}

// Where the elements of a mask lie: constant along any of the axes.
struct MaskCase {
  Bytes bytes;
  Mask mask;
  MaskCase(Random& random, const Shape& s, bool along_c) {
    if (random() % 2 == 0) return;
    const bool o = random() % 2, r = random() % 4, c = along_c && random() % 2;
    const int64_t share = one_of<int64_t>(random, {0, 1, 5, 9, 10});
    bytes.resize(std::max<int64_t>(1, (o ? s.O : 1) * (r ? s.R : 1) * (c ? s.C : 1)));
    for (uint8_t& b : bytes) b = static_cast<int64_t>(random() % 10) < share;
    mask = {bytes.data(), o ? (r ? s.R : 1) * (c ? s.C : 1) : 0, r ? (c ? s.C : 1) : 0, c ? 1 : 0};
  }
  bool counts(int64_t o, int64_t r, int64_t c) const { return bytes.empty() || bytes[o * mask.o + r * mask.r + c * mask.c]; }
};

// x, and all that goes with it: half-precision types are mixed.
struct Case {
  Shape shape;
  Type type, other, arithmetic;
  Act act;
  Style style;
  MaskCase mask;
  Reals x, residual, dy;
  Real u;
  bool output = false;
  std::string name;

  Case(Random& random, const Shape& s, Type t, bool along_c, bool any_infinite)
      : shape(s), type(t), other(t == Type::f64 || random() % 2 ? t : one_of(random, {Type::f32, Type::bf16, Type::f16})),
        arithmetic(t == Type::f64 ? Type::f64 : Type::f32), act(static_cast<Act>(random() % 5)), mask(random, s, along_c),
        u(unit(arithmetic)) {
    const Style last = any_infinite ? Style::infinite : Style::plain;
    style = one_of(random, {Style::plain, Style::far, Style::far_first, Style::uncounted_infinite, last});
    const Real far = type == Type::f32 || type == Type::f64 ? 1e4L : 10;
    x = normal(random, s.size(), type, style == Style::far ? far : 0.5L);
    residual = random() % 2 ? normal(random, s.size(), other) : Reals();
    dy = normal(random, s.size(), other);
    const Real infinity = std::numeric_limits<Real>::infinity(), wild[] = {infinity, -infinity, std::numeric_limits<Real>::quiet_NaN()};
    each([&](int64_t o, int64_t r, int64_t c, int64_t i) {
      if (style == Style::far_first && r < 16) x[i] = rounded(type, 1000 + x[i]);
      if (style == Style::uncounted_infinite && !mask.counts(o, r, c) && random() % 2) x[i] = wild[random() % 3];
    });
    if (style == Style::infinite && !x.empty()) x[random() % x.size()] = wild[random() % 3];
    char text[160];
    std::snprintf(text, sizeof text, "%s[%d,%d,%d] with %s, act %s%s, mask %s %d %d %d, style %d", kTypes[static_cast<int>(type)],
                  static_cast<int>(s.O), static_cast<int>(s.R), static_cast<int>(s.C), kTypes[static_cast<int>(other)],
                  kActs[static_cast<int>(act)], residual.empty() ? "" : ", residual", mask.bytes.empty() ? "none" : "some",
                  static_cast<int>(mask.mask.o), static_cast<int>(mask.mask.r), static_cast<int>(mask.mask.c), static_cast<int>(style));
    name = text;
  }
  // Sometimes x stands for y, of which the kernels then tell it.
  void may_be_output(Random& random) {
    output = random() % 3 == 0;
    if (!output) return;
    residual.clear();
    act = one_of(random, {Act::none, Act::leaky_relu});
    name += std::string(", all from y, of ") + kActs[static_cast<int>(act)];
  }
  // Where an element is 0 for being neither counted nor finite.
  bool usable(int64_t o, int64_t r, int64_t c, int64_t i) const { return mask.counts(o, r, c) || std::isfinite(x[i]); }
  template <class F> void each(const F& f) const {
    int64_t i = 0;
    for (int64_t o = 0; o < shape.O; o++)
      for (int64_t r = 0; r < shape.R; r++)
        for (int64_t c = 0; c < shape.C; c++) f(o, r, c, i++);
  }
  // The moments of `group` neighboring channels, for each group.
  std::vector<Moments> statistics(int64_t group, Real power = 1) const {
    std::vector<Reals> counted(shape.columns() / group);
    each([&](int64_t o, int64_t r, int64_t c, int64_t i) {
      if (mask.counts(o, r, c)) counted[(o * shape.C + c) / group].push_back(x[i] * power);
    });
    std::vector<Moments> s;
    for (const Reals& v : counted) s.push_back(moments(v, u));
    return s;
  }
};

}  // namespace driver

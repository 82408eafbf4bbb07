// The kernels as XLA's foreign functions. Small operands come and go as [O, C], x as [O, R, C], rows as [O, R]; which of the optional operands
// there are, attributes say.
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#include "xla_pool.h"

namespace ffi = xla::ffi;

namespace jnorm {
namespace {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    default: return "baseline";
  }
}

// The best instruction set, or the one that the environment asks for, which tests do.
Isa chosen_isa() {
  static const Isa isa = [] {
    const char* const wanted = std::getenv("JNORM_ISA");
    for (Isa value : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
      if (wanted && !std::strcmp(wanted, name_of(value)) && available(value)) return value;
    }
    return best_isa();
  }();
  return isa;
}

std::optional<Type> type_of(ffi::DataType t) {
  switch (t) {
    case ffi::F32: return Type::f32;
    case ffi::F64: return Type::f64;
    case ffi::BF16: return Type::bf16;
    case ffi::F16: return Type::f16;
    default: return std::nullopt;
  }
}

// Operands in order, the optional ones where flags say so. What does not fit is remembered, and reported at the end.
class Operands {
 public:
  Operands(ffi::RemainingArgs args, ffi::RemainingRets rets) : args_(args), rets_(rets) {}

  Array array() {
    auto b = args_.get<ffi::AnyBuffer>(in_++);
    return b.has_value() ? array_of(b->untyped_data(), b->element_type()) : missing();
  }
  Array array(bool there) { return there ? array() : Array{}; }
  void* small() { return array().data; }
  Array result() {
    auto b = rets_.get<ffi::AnyBuffer>(out_++);
    return b.has_value() ? array_of((*b)->untyped_data(), (*b)->element_type()) : missing();
  }
  Array result(bool there) { return there ? result() : Array{}; }
  // [O|1, R|1, C|1] bytes, without strides where an axis has one element only.
  Mask mask(bool there) {
    if (!there) return {};
    auto b = args_.get<ffi::AnyBuffer>(in_++);
    if (!b.has_value() || b->element_type() != ffi::PRED || b->dimensions().size() != 3) return missing(), Mask{};
    const auto d = b->dimensions();
    return {static_cast<const uint8_t*>(b->untyped_data()), d[0] > 1 ? d[1] * d[2] : 0, d[1] > 1 ? d[2] : 0, d[2] > 1 ? 1 : 0};
  }
  ffi::Span<const int64_t> dimensions(size_t i) const {
    auto b = args_.get<ffi::AnyBuffer>(i);
    return b.has_value() ? b->dimensions() : ffi::Span<const int64_t>();
  }
  ffi::Error error(size_t rank) const {
    if (wrong_ || dimensions(0).size() != rank) return ffi::Error::InvalidArgument("jnorm: operands that its kernels do not have");
    return ffi::Error::Success();
  }

 private:
  Array array_of(void* data, ffi::DataType t) {
    const auto type = type_of(t);
    // An array of no elements may have no memory, but it is there.
    static char nowhere[64];
    return type ? Array{data ? data : nowhere, *type} : missing();
  }
  Array missing() {
    wrong_ = true;
    return {};
  }
  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  size_t in_ = 0, out_ = 0;
  bool wrong_ = false;
};

ffi::Error moments_call(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, bool mask) {
  Operands of(args, rets);
  const Array x = of.array();
  const Mask m = of.mask(mask);
  void* out[4];
  for (void*& p : out) p = of.result().data;
  if (auto e = of.error(3); e.failure()) return e;
  const auto d = of.dimensions(0);
  XlaPool pool(threads);
  moments(chosen_isa(), pool, d[0], d[1], d[2], x, m, out[0], out[1], out[2], out[3]);
  return ffi::Error::Success();
}

// x, center, offset, shift, mul, add, [residual], [mask], from operand `first` on.
Column column_of(Operands& of, size_t first, int32_t act, bool residual, bool mask, bool output) {
  Column c{};
  c.x = of.array();
  c.center = of.small();
  c.offset = of.small();
  c.shift = of.small();
  c.mul = of.small();
  c.add = of.small();
  c.residual = of.array(residual);
  c.mask = of.mask(mask);
  c.act = static_cast<Act>(act);
  c.output = output;
  const auto d = of.dimensions(first);
  if (d.size() == 3) c.O = d[0], c.R = d[1], c.C = d[2];
  return c;
}

ffi::Error apply_call(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t act, bool residual, bool mask) {
  Operands of(args, rets);
  const Column c = column_of(of, 0, act, residual, mask, false);
  const Array y = of.result();
  if (auto e = of.error(3); e.failure()) return e;
  XlaPool pool(threads);
  apply(chosen_isa(), pool, c, y);
  return ffi::Error::Success();
}

ffi::Error cotangent_sums_call(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t act, bool residual,
                               bool mask, bool output) {
  Operands of(args, rets);
  const Array dy = of.array();
  const Column c = column_of(of, 1, act, residual, mask, output);
  void *const first = of.result().data, *const second = of.result().data;
  if (auto e = of.error(3); e.failure()) return e;
  XlaPool pool(threads);
  cotangent_sums(chosen_isa(), pool, c, dy, first, second);
  return ffi::Error::Success();
}

ffi::Error cotangent_apply_call(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t act, bool residual,
                                bool mask, bool output) {
  Operands of(args, rets);
  const Array dy = of.array();
  const void *const a = of.small(), *const b = of.small();
  const Column c = column_of(of, 3, act, residual, mask, output);
  const Array dx = of.result(), dresidual = of.result(residual);
  if (auto e = of.error(3); e.failure()) return e;
  XlaPool pool(threads);
  cotangent_apply(chosen_isa(), pool, c, dy, a, b, dx, dresidual);
  return ffi::Error::Success();
}

ffi::Error group_norm_call(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t act, int64_t group,
                           double epsilon, bool mask) {
  Operands of(args, rets);
  Group g{};
  g.x = of.array();
  g.scale = of.small();
  g.bias = of.small();
  g.mask = of.mask(mask);
  g.act = static_cast<Act>(act);
  g.group = group;
  const Array y = of.result();
  void* out[3];
  for (void*& p : out) p = of.result().data;
  if (auto e = of.error(3); e.failure()) return e;
  const auto d = of.dimensions(0);
  g.O = d[0], g.R = d[1], g.C = d[2];
  XlaPool pool(threads);
  group_norm(chosen_isa(), pool, g, epsilon, y, out[0], out[1], out[2]);
  return ffi::Error::Success();
}

ffi::Error group_cotangent_call(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t act, int64_t group,
                                bool mask, bool output) {
  Operands of(args, rets);
  Group g{};
  g.output = output;
  const Array dy = of.array();
  g.x = of.array();
  const void *const center = of.small(), *const offset = of.small(), *const rstd = of.small();
  g.scale = of.small();
  g.bias = of.small();
  g.mask = of.mask(mask);
  g.act = static_cast<Act>(act);
  g.group = group;
  const Array dx = of.result();
  void *const dscale = of.result().data, *const dbias = of.result().data;
  if (auto e = of.error(3); e.failure()) return e;
  const auto d = of.dimensions(0);
  g.O = d[0], g.R = d[1], g.C = d[2];
  XlaPool pool(threads);
  group_cotangent(chosen_isa(), pool, g, dy, center, offset, rstd, dx, dscale, dbias);
  return ffi::Error::Success();
}

// Scale and bias are [G, R], the mask [O|1, R|1, 1].
void finish_row(Row& row, const Operands& of, size_t x, size_t scale) {
  const auto d = of.dimensions(x), s = of.dimensions(scale);
  if (d.size() == 2 && s.size() == 2) row.O = d[0], row.R = d[1], row.G = s[0];
}

ffi::Error row_norm_call(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t act, int64_t inner, bool centered,
                         double epsilon, bool residual, bool mask) {
  Operands of(args, rets);
  Row row{};
  row.x = of.array();
  const Array r = of.array(residual);
  row.scale = of.small();
  row.bias = of.small();
  row.mask = of.mask(mask);
  row.act = static_cast<Act>(act);
  row.inner = inner;
  row.centered = centered;
  const Array y = of.result(), sum = of.result(residual);
  RowStats stats{};
  for (void** p : {&stats.power, &stats.center, &stats.offset, &stats.rstd}) *p = of.result().data;
  if (auto e = of.error(2); e.failure()) return e;
  finish_row(row, of, 0, residual ? 2 : 1);
  XlaPool pool(threads);
  row_norm(chosen_isa(), pool, row, epsilon, r, y, sum, stats);
  return ffi::Error::Success();
}

ffi::Error row_cotangent_call(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t act, int64_t inner,
                              bool centered, bool residual, bool mask, bool output) {
  Operands of(args, rets);
  Row row{};
  row.output = output;
  const Array dy = of.array(), dsum = of.array(residual);
  row.x = of.array();
  RowStats stats{};
  for (void** p : {&stats.power, &stats.center, &stats.offset, &stats.rstd}) *p = of.small();
  row.scale = of.small();
  row.bias = of.small();
  row.mask = of.mask(mask);
  row.act = static_cast<Act>(act);
  row.inner = inner;
  row.centered = centered;
  const Array dx = of.result();
  void *const dscale = of.result().data, *const dbias = of.result().data;
  if (auto e = of.error(2); e.failure()) return e;
  finish_row(row, of, residual ? 2 : 1, residual ? 7 : 6);
  XlaPool pool(threads);
  row_cotangent(chosen_isa(), pool, row, stats, dy, dsum, dx, dscale, dbias);
  return ffi::Error::Success();
}

auto call() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets(); }

}  // namespace
}  // namespace jnorm

#define JNORM_EXPORT extern "C" __attribute__((visibility("default")))

JNORM_EXPORT const char* jnorm_isa() { return jnorm::name_of(jnorm::chosen_isa()); }

#define JNORM_HANDLER(name, binding)                             \
  JNORM_EXPORT XLA_FFI_Error* jnorm_##name(XLA_FFI_CallFrame*);  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jnorm_##name, jnorm::name##_call, binding)

JNORM_HANDLER(moments, jnorm::call().Attr<bool>("mask"));
JNORM_HANDLER(apply, jnorm::call().Attr<int32_t>("act").Attr<bool>("residual").Attr<bool>("mask"));
JNORM_HANDLER(cotangent_sums, jnorm::call().Attr<int32_t>("act").Attr<bool>("residual").Attr<bool>("mask").Attr<bool>("output"));
JNORM_HANDLER(cotangent_apply, jnorm::call().Attr<int32_t>("act").Attr<bool>("residual").Attr<bool>("mask").Attr<bool>("output"));
JNORM_HANDLER(group_norm, jnorm::call().Attr<int32_t>("act").Attr<int64_t>("group").Attr<double>("epsilon").Attr<bool>("mask"));
JNORM_HANDLER(group_cotangent, jnorm::call().Attr<int32_t>("act").Attr<int64_t>("group").Attr<bool>("mask").Attr<bool>("output"));
JNORM_HANDLER(row_norm, jnorm::call().Attr<int32_t>("act").Attr<int64_t>("inner").Attr<bool>("centered").Attr<double>("epsilon")
                            .Attr<bool>("residual").Attr<bool>("mask"));
JNORM_HANDLER(row_cotangent, jnorm::call().Attr<int32_t>("act").Attr<int64_t>("inner").Attr<bool>("centered").Attr<bool>("residual")
                                 .Attr<bool>("mask").Attr<bool>("output"));

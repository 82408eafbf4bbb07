// The functions of one instruction set.
#include "leaf.h"

namespace jnorm {
namespace JNORM_ISA {

void moments_of(const ColumnChunk&, const Partial&);
void apply_to(const ColumnChunk&);
void cotangent_sums_of(const ColumnChunk&, const Partial&);
void cotangent_apply_to(const ColumnChunk&);
void row_norm_of(const Row&, const RowChunk&);
void row_cotangent_of(const Row&, const RowChunk&);

extern const Leaf leaf;
const Leaf leaf = {moments_of, apply_to, cotangent_sums_of, cotangent_apply_to, row_norm_of, row_cotangent_of};

}  // namespace JNORM_ISA
}  // namespace jnorm

#pragma once

#include "leaf.h"

namespace jnorm {

const Leaf& leaf_of(Isa isa);

}  // namespace jnorm

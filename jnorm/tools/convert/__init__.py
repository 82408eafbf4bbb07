"""Norms and models of other libraries, to jnorm and back: `jnorm.tools.convert`, which is imported by its own name."""

from ._norm import Norm as Norm
from ._norm import of_linen as of_linen
from ._norm import of_nnx as of_nnx
from ._torch import as_torch as as_torch
from ._torch import of_torch as of_torch

__all__ = ["Norm", "as_torch", "of_linen", "of_nnx", "of_torch"]

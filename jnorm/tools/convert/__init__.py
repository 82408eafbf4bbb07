"""Norms and models of other libraries, to jnorm and back: `jnorm.tools.convert`, which is imported by its own name."""

from ._models import load_torch as load_torch
from ._models import load_torch_linen as load_torch_linen
from ._models import to_torch as to_torch
from ._models import to_torch_linen as to_torch_linen
from ._norm import Norm as Norm
from ._norm import of_linen as of_linen
from ._norm import of_nnx as of_nnx
from ._torch import as_torch as as_torch
from ._torch import of_torch as of_torch

__all__ = ["Norm", "as_torch", "load_torch", "load_torch_linen", "of_linen", "of_nnx", "of_torch", "to_torch", "to_torch_linen"]

"""Norms and models of other libraries, to jnorm and back: `jnorm.tools.convert`, which is imported by its own name."""

from ._equinox import as_equinox as as_equinox
from ._equinox import of_equinox as of_equinox
from ._equinox import weights_of_equinox as weights_of_equinox
from ._flax import load_flax as load_flax
from ._haiku import HaikuNorm as HaikuNorm
from ._haiku import as_haiku as as_haiku
from ._haiku import of_haiku as of_haiku
from ._haiku_models import weights_of_haiku as weights_of_haiku
from ._keras import as_keras as as_keras
from ._keras import of_keras as of_keras
from ._keras import weights_of_keras as weights_of_keras
from ._load import load as load
from ._load import load_linen as load_linen
from ._norm import Norm as Norm
from ._norm import of_linen as of_linen
from ._norm import of_nnx as of_nnx
from ._source import Weights as Weights
from ._torch import as_torch as as_torch
from ._torch import of_torch as of_torch
from ._torch_models import to_torch as to_torch
from ._torch_models import to_torch_linen as to_torch_linen

__all__ = [
    "HaikuNorm",
    "Norm",
    "Weights",
    "as_equinox",
    "as_haiku",
    "as_keras",
    "as_torch",
    "load",
    "load_flax",
    "load_linen",
    "of_equinox",
    "of_haiku",
    "of_keras",
    "of_linen",
    "of_nnx",
    "of_torch",
    "to_torch",
    "to_torch_linen",
    "weights_of_equinox",
    "weights_of_haiku",
    "weights_of_keras",
]

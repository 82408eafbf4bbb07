"""A wrapper that propagates normalization through a layer."""

from collections.abc import Iterable
from dataclasses import field
from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import errors_in, result_dtype
from ..reparam.normalization_propagation import propagated_kernel, standardized_activation
from ..typing import Activation, Axes
from ._variables import Initializer, call_with_params, errors_of
from ._weights import filtered, scale_of


@final
class NormalizationPropagation(nn.Module):
    """Normalization propagation around a layer: :func:`jnorm.reparam.normalization_propagation`, with the activation in it.

    The layer is the linear operation, and keeps its parameters where they are; its own bias, where it has one, is the bias. "params" of
    this module holds a scale for each of the layer's kernels: `"Dense_0/kernel/scale"`.

    Args:
      layer_instance: the layer, such as `Dense` or `Conv`, without an activation.
      activation: "relu", "leaky_relu", "silu", "gelu", or any callable that acts on each element by itself. None: a linear last layer.
      gain: None: 1/J, see :func:`jnorm.reparam.activation_moments`.
      feature_axes: the kernel's axes of units.
      epsilon: added to the sum of squares.
      dtype: y's; None: that of the layer's output.
      param_dtype: of the scales.
      use_scale: learn the scales; else they are 1.
      scale_init: initializer of the scales.
      variable_filter: the parameters whose path, such as "Dense_0/kernel", contains one of these are normalized, at least one;
        None: all.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> layer = jnn.NormalizationPropagation(nn.Dense(2))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'layer_instance': {'bias': (2,), 'kernel': (3, 2)}, 'layer_instance/kernel/scale': (2,)}
    """

    layer_instance: nn.Module
    activation: Activation | None = "relu"
    gain: float | None = None
    feature_axes: Axes = -1
    epsilon: float = 1e-12
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = nn.initializers.ones
    variable_filter: Iterable[str] | None = field(default_factory=lambda: {"kernel"})

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output with normalized weights, activated, and with what the activation did to mean and variance undone."""

        def propagated(path: str, v: jax.Array) -> jax.Array:
            scale, features = scale_of(self, path, v)
            with errors_of(self), errors_in(lambda: path):
                return propagated_kernel(
                    v,
                    scale,
                    activation=self.activation,
                    gain=self.gain,
                    feature_axes=features,
                    epsilon=self.epsilon,
                    dtype=result_dtype(v, scale, dtype=None),
                )

        t = call_with_params(self, self.layer_instance, filtered(self.variable_filter, propagated), args, kwargs)
        with errors_of(self):
            return standardized_activation(t, None, activation=self.activation, dtype=result_dtype(t, dtype=self.dtype))

"""A wrapper that propagates normalization through a layer."""

from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import result_dtype
from ..reparam.normalization_propagation import propagated_kernel, standardized_activation
from ..typing import Activation, Axes
from ._variables import Initializer, Path, call_with_params, errors_of, static
from ._weights import scales_of, weights_of


@final
class NormalizationPropagation(nnx.Module):
    """Normalization propagation around a layer: :func:`jnorm.reparam.normalization_propagation`, with the activation in it.

    The layer is the linear operation, and keeps its parameters, which are never written; its own bias, where it has one, is the bias.
    `scales` holds an `nnx.Param`, the scale, for each of the layer's kernels, by its path in the layer. Other variables and plain
    attributes: as in :class:`WeightNorm`.

    Args:
      layer_instance: the layer, such as `Linear` or `Conv`, without an activation.
      activation: "relu", "leaky_relu", "silu", "gelu", or any callable that acts on each element by itself. None: a linear last layer.
      gain: None: 1/J, see :func:`jnorm.reparam.activation_moments`.
      feature_axes: the kernel's axes of units.
      epsilon: added to the sum of squares.
      dtype: y's; None: that of the layer's output.
      param_dtype: of the scales.
      use_scale: learn the scales; else they are 1.
      scale_init: initializer of the scales.
      variable_filter: which parameters are normalized, at least one.
      rngs: keys for `scale_init`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jnx.NormalizationPropagation(nnx.Linear(3, 2, rngs=rngs), rngs=rngs)
      >>> layer(jnp.ones((1, 3))).shape, layer.scales[("kernel",)].shape
      ((1, 2), (2,))
    """

    scales: dict[Path, nnx.Param[jax.Array]] | None

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        activation: Activation | None = "relu",
        gain: float | None = None,
        feature_axes: Axes = -1,
        epsilon: float = 1e-12,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = nnx.initializers.ones,
        variable_filter: Any = nnx.PathContains("kernel"),  # noqa: B008
        rngs: nnx.Rngs,
    ) -> None:
        self.layer_instance = layer_instance
        self.activation = activation
        self.gain = gain
        self.feature_axes = static(feature_axes)
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        self.scales = scales_of(self, rngs)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output with normalized weights, activated, and with what the activation did to mean and variance undone."""
        kernels = {}
        for path, v, scale, features in weights_of(self):
            with errors_of(self, path):
                kernels[path] = propagated_kernel(
                    v,
                    scale,
                    activation=self.activation,
                    gain=self.gain,
                    feature_axes=features,
                    epsilon=self.epsilon,
                    dtype=result_dtype(v, scale, dtype=None),
                )
        t = call_with_params(self.layer_instance, kernels, x, *args, **kwargs)
        with errors_of(self):
            return standardized_activation(t, None, activation=self.activation, dtype=result_dtype(t, dtype=self.dtype))

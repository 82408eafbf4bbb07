"""Filter response normalization, and the activation that goes with it."""

from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import check_keeps_batch, distinct_axes, feature_shape, floating, merged_axes, result_dtype
from .._norms.filter_response_norm import LEARNED_EPSILON_INIT, filter_response_norm, thresholded_linear_unit
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Mask
from ._variables import Initializer, bias_param, errors_of, scale_param


@final
class FilterResponseNorm(nn.Module):
    """Filter response normalization: :func:`jnorm.filter_response_norm` with its scale and bias, and an epsilon, as parameters.

    It has no activation of its own: :class:`ThresholdedLinearUnit` comes after it.

    Args:
      use_learned_epsilon: add the size of a learned number, the scalar parameter "learned_epsilon", to the epsilon. For maps of one
        position, and for x of shape (N, C).
      epsilon: added to the mean square.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale, bias and the learned epsilon.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      learned_epsilon_init: initializer of the learned epsilon.
      reduction_axes: the axes that are reduced, none of them a feature axis; None: all but the first and the feature axes.
      feature_axes: the axes along which scale and bias vary, not the first.
      axis_name: named axis or axes over which the reduced axes are split; not used in initialization.
      axis_index_groups: groups of equal size within that axis.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jnorm import linen as jnn
      >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])  # one sample, two positions, two channels
      >>> y, variables = jnn.FilterResponseNorm(use_learned_epsilon=True).init_with_output(jax.random.key(0), x)
      >>> print(np.asarray(y).round(3).ravel())
      [0.447 0.447 1.342 1.342]
      >>> {k: v.shape for k, v in variables["params"].items()}
      {'scale': (2,), 'bias': (2,), 'learned_epsilon': ()}
    """

    use_learned_epsilon: bool = False
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    learned_epsilon_init: Initializer = LEARNED_EPSILON_INIT
    reduction_axes: Axes | None = None
    feature_axes: Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    activation: Activation | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Normalizes x; `mask` broadcasts against it, and what it counts enters the mean square."""
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            check_keeps_batch(self.reduction_axes, features, x.ndim)
            shape = feature_shape(x, features, "feature_axes")
            scale, bias, learned = scale_param(self, shape), bias_param(self, shape), None
            if self.use_learned_epsilon:
                learned = self.param("learned_epsilon", self.learned_epsilon_init, (), self.param_dtype)
            return filter_response_norm(
                x,
                scale,
                bias,
                learned_epsilon=learned,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                **merged_axes(self, not self.is_initializing()),
                activation=self.activation,
                dtype=result_dtype(given, scale, bias, dtype=self.dtype),
            )


@final
class ThresholdedLinearUnit(nn.Module):
    """The maximum of x and a threshold of each channel: :func:`jnorm.thresholded_linear_unit` with the threshold as a parameter.

    Args:
      feature_axes: the axes along which the threshold varies.
      param_dtype: of the threshold. y has x's dtype whatever it is.
      threshold_init: initializer of the threshold; with 0 the unit starts as a ReLU.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> y, variables = jnn.ThresholdedLinearUnit().init_with_output(jax.random.key(0), jnp.array([[-1.0, 0.5]]))
      >>> y.tolist(), variables["params"]["threshold"].tolist()
      ([[0.0, 0.5]], [0.0, 0.0])
    """

    feature_axes: Axes = -1
    param_dtype: Any = jnp.float32
    threshold_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The maximum of x and the threshold."""
        with errors_of(self):
            x = floating(x, None)
            features = distinct_axes(self.feature_axes, x.ndim)
            threshold = self.param("threshold", self.threshold_init, feature_shape(x, features, "feature_axes"), self.param_dtype)
            return thresholded_linear_unit(x, threshold, feature_axes=features)

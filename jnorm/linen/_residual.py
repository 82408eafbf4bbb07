"""Norms of x + residual that return the sum too: the residual stream of a transformer."""

from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import distinct_axes, feature_shape, floating, merged_axes, result_dtype
from .._norms.add_norm import add_layer_norm, add_rms_norm
from .._pipeline.values import as_array
from ..typing import Axes, AxisIndexGroups, AxisName, Mask
from ._variables import Initializer, bias_param, errors_of, scale_param


@final
class AddLayerNorm(nn.Module):
    """Adds a residual and normalizes: :func:`jnorm.add_layer_norm` with its scale and bias as parameters, which are those of `LayerNorm`.

    Args:
      epsilon: added to the variance.
      dtype: y's; None: what x, scale and bias promote to. The sum has what x and residual promote to, statistics at least float32.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes over which each remaining position is normalized.
      feature_axes: the axes along which scale and bias vary.
      axis_name: named axis or axes over which the reduced axes are split; not used in initialization.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the variance is the stable one either way.
      force_float32_reductions: accepted; sums are in at least float32 either way.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jnorm import linen as jnn
      >>> layer, x, residual = jnn.AddLayerNorm(), jnp.array([1.0, 1.0, 1.0]), jnp.array([0.0, 1.0, 2.0])
      >>> variables = layer.init(jax.random.key(0), x, residual)
      >>> y, total = layer.apply(variables, x, residual)
      >>> print(np.asarray(y).round(3), total)
      [-1.225  0.     1.225] [1. 2. 3.]
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array, *, mask: Mask | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns y and x + residual; `mask` broadcasts against x, and what it counts enters the statistics."""
        with errors_of(self):
            given, other = as_array(x), as_array(residual, "residual")
            x, residual = floating(given, self.dtype), floating(other, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = feature_shape(x, features, "feature_axes")
            scale, bias = scale_param(self, shape), bias_param(self, shape)
            y, total = add_layer_norm(
                x,
                residual,
                scale,
                bias,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                **merged_axes(self, not self.is_initializing()),
                dtype=result_dtype(given, scale, bias, dtype=self.dtype),
            )
            return y, total.astype(result_dtype(given, other, dtype=None))


@final
class AddRMSNorm(nn.Module):
    """Adds a residual and normalizes: :func:`jnorm.add_rms_norm` with its scale as a parameter, which is that of `RMSNorm`.

    Args:
      epsilon: added to the mean square.
      dtype: y's; None: what x and scale promote to. The sum has what x and residual promote to, statistics at least float32.
      param_dtype: of the scale.
      use_scale: multiply by a scale.
      scale_init: initializer of the scale.
      reduction_axes: the axes over which each remaining position is normalized.
      feature_axes: the axes along which the scale varies.
      axis_name: named axis or axes over which the reduced axes are split; not used in initialization.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the mean square has one form.
      force_float32_reductions: accepted; sums are in at least float32 either way.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jnorm import linen as jnn
      >>> (y, total), variables = jnn.AddRMSNorm().init_with_output(jax.random.key(0), jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0]))
      >>> print(np.asarray(y).round(3), total)
      [0.849 1.131] [3. 4.]
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = nn.initializers.ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array, *, mask: Mask | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns y and x + residual; `mask` broadcasts against x, and what it counts enters the statistics."""
        with errors_of(self):
            given, other = as_array(x), as_array(residual, "residual")
            x, residual = floating(given, self.dtype), floating(other, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            scale = scale_param(self, feature_shape(x, features, "feature_axes"))
            y, total = add_rms_norm(
                x,
                residual,
                scale,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                **merged_axes(self, not self.is_initializing()),
                dtype=result_dtype(given, scale, dtype=self.dtype),
            )
            return y, total.astype(result_dtype(given, other, dtype=None))

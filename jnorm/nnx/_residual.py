"""Norms of x + residual that return the sum too: the residual stream of a transformer."""

from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import distinct_axes, floating, result_dtype
from .._norms.add_norm import add_layer_norm, add_rms_norm
from .._pipeline.values import as_array
from ..typing import Axes, AxisIndexGroups, AxisName, Mask
from ._variables import (
    NO_METADATA,
    Initializer,
    Metadata,
    PromoteDtype,
    affine_param,
    errors_of,
    promote_dtype,
    shape_of_features,
    static,
    value,
    y_dtype,
)


@final
class AddLayerNorm(nnx.Module):
    """Adds a residual and normalizes: :func:`jnorm.add_layer_norm` with its scale and bias as parameters, which are those of `LayerNorm`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      epsilon: added to the variance.
      dtype: y's; None: what `promote_dtype` gives for x. The sum has what x and residual promote to, statistics at least float32.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes over which each remaining position is normalized.
      feature_axes: the axes along which scale and bias vary.
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the variance is the stable one either way.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.AddLayerNorm(3, rngs=nnx.Rngs(0))
      >>> y, total = layer(jnp.array([1.0, 1.0, 1.0]), jnp.array([0.0, 1.0, 2.0]))
      >>> print(np.asarray(y).round(3), total)
      [-1.225  0.     1.225] [1. 2. 3.]
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = static(reduction_axes)
        self.feature_axes = static(feature_axes)
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(self, x: jax.Array, residual: jax.Array, *, mask: Mask | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns y and x + residual; `mask` broadcasts against x, and what it counts enters the statistics."""
        with errors_of(self):
            given, other = as_array(x), as_array(residual, "residual")
            x, residual = floating(given, self.dtype), floating(other, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = shape_of_features(self, x, features, "feature_axes")
            scale, bias = value(self.scale, shape), value(self.bias, shape)
            y, total = add_layer_norm(
                x,
                residual,
                scale,
                bias,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                dtype=y_dtype(self, given, affine=(scale, bias)),
            )
            return y, total.astype(result_dtype(given, other, dtype=None))


@final
class AddRMSNorm(nnx.Module):
    """Adds a residual and normalizes: :func:`jnorm.add_rms_norm` with its scale as a parameter, which is that of `RMSNorm`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      epsilon: added to the mean square.
      dtype: y's; None: what `promote_dtype` gives for x. The sum has what x and residual promote to, statistics at least float32.
      param_dtype: of the scale.
      use_scale: multiply by a scale.
      scale_init: initializer of the scale.
      reduction_axes: the axes over which each remaining position is normalized.
      feature_axes: the axes along which the scale varies.
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the mean square has one form.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes the scale.
      scale_metadata: metadata of the scale's variable.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> y, total = jnx.AddRMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0]))
      >>> print(np.asarray(y).round(3), total)
      [0.849 1.131] [3. 4.]
    """

    scale: nnx.Param[jax.Array] | None

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = nnx.initializers.ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_scale = use_scale
        self.reduction_axes = static(reduction_axes)
        self.feature_axes = static(feature_axes)
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def __call__(self, x: jax.Array, residual: jax.Array, *, mask: Mask | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns y and x + residual; `mask` broadcasts against x, and what it counts enters the statistics."""
        with errors_of(self):
            given, other = as_array(x), as_array(residual, "residual")
            x, residual = floating(given, self.dtype), floating(other, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            scale = value(self.scale, shape_of_features(self, x, features, "feature_axes"))
            y, total = add_rms_norm(
                x,
                residual,
                scale,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                dtype=y_dtype(self, given, affine=(scale,)),
            )
            return y, total.astype(result_dtype(given, other, dtype=None))

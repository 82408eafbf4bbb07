"""Norms that hold a scale and a bias only."""

from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import check_groups, check_keeps_batch, distinct_axes, feature_shape, floating, merged_axes, result_dtype
from .._norms.group_norm import group_norm
from .._norms.instance_norm import instance_norm
from .._norms.layer_norm import layer_norm, rms_norm
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Mask, Save
from ._variables import Initializer, bias_param, errors_of, scale_param


@final
class LayerNorm(nn.Module):
    """Layer normalization: :func:`jnorm.layer_norm` with its scale and bias as parameters, in place of `flax.linen.LayerNorm`.

    Args:
      epsilon: added to the variance.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
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
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.layer_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jnorm import linen as jnn
      >>> layer = jnn.LayerNorm()
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> {k: v.shape for k, v in variables["params"].items()}
      {'scale': (3,), 'bias': (3,)}
      >>> print(np.asarray(layer.apply(variables, jnp.array([1.0, 2.0, 3.0]))).round(3))
      [-1.225  0.     1.225]
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
    save: Save = "input"

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Normalizes x; `mask` broadcasts against it, and what it counts enters the statistics."""
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = feature_shape(x, features, "feature_axes")
            scale, bias = scale_param(self, shape), bias_param(self, shape)
            return layer_norm(
                x,
                scale,
                bias,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                **merged_axes(self, not self.is_initializing()),
                dtype=result_dtype(given, scale, bias, dtype=self.dtype),
                save=self.save,
            )


@final
class RMSNorm(nn.Module):
    """Root-mean-square normalization: :func:`jnorm.rms_norm` with its scale as a parameter, in place of `flax.linen.RMSNorm`.

    Args:
      epsilon: added to the mean square.
      dtype: y's; None: what x and scale promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of the scale.
      use_scale: multiply by a scale.
      scale_init: initializer of the scale.
      reduction_axes: the axes over which each remaining position is normalized.
      feature_axes: the axes along which the scale varies.
      axis_name: named axis or axes over which the reduced axes are split; not used in initialization.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the mean square has one form.
      force_float32_reductions: accepted; sums are in at least float32 either way.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.rms_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jnorm import linen as jnn
      >>> y, variables = jnn.RMSNorm().init_with_output(jax.random.key(0), jnp.array([3.0, 4.0]))
      >>> print(np.asarray(y).round(3))
      [0.849 1.131]
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
    save: Save = "input"

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Normalizes x; `mask` broadcasts against it, and what it counts enters the statistics."""
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            scale = scale_param(self, feature_shape(x, features, "feature_axes"))
            return rms_norm(
                x,
                scale,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                **merged_axes(self, not self.is_initializing()),
                dtype=result_dtype(given, scale, dtype=self.dtype),
                save=self.save,
            )


@final
class GroupNorm(nn.Module):
    """Group normalization: :func:`jnorm.group_norm` with its scale and bias as parameters, in place of `flax.linen.GroupNorm`.

    Args:
      num_groups: number of groups of contiguous channels; None with `group_size`.
      group_size: channels in a group.
      epsilon: added to the variance.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes that are reduced, the channel axis (reduced within groups) among them; None: all but the first.
      axis_name: named axis or axes over which the reduced axes are split; not used in initialization.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the variance is the stable one either way.
      force_float32_reductions: accepted; sums are in at least float32 either way.
      feature_axes: the channel axis, one.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.group_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> layer = jnn.GroupNorm(num_groups=2, activation="relu")
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 8)))
      >>> layer.apply(variables, jnp.ones((1, 4, 4, 8))).shape
      (1, 4, 4, 8)
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    reduction_axes: Axes | None = None
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    feature_axes: int = -1
    activation: Activation | None = None
    save: Save = "input"

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Normalizes x; `mask` broadcasts against it, and what it counts enters the statistics."""
        with errors_of(self):
            check_groups(self.num_groups, self.group_size)
            given = as_array(x)
            x = floating(given, self.dtype)
            shape = feature_shape(x, self.feature_axes, "feature_axes")
            scale, bias = scale_param(self, shape), bias_param(self, shape)
            return group_norm(
                x,
                scale,
                bias,
                num_groups=self.num_groups,
                group_size=self.group_size,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=self.feature_axes,
                epsilon=self.epsilon,
                mask=mask,
                **merged_axes(self, not self.is_initializing()),
                activation=self.activation,
                dtype=result_dtype(given, scale, bias, dtype=self.dtype),
                save=self.save,
            )


@final
class InstanceNorm(nn.Module):
    """Instance normalization: :func:`jnorm.instance_norm` with its scale and bias as parameters, in place of `flax.linen.InstanceNorm`.

    Args:
      epsilon: added to the variance.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axes along which scale and bias vary, not the first.
      axis_name: named axis or axes over which the reduced axes are split; not used in initialization.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the variance is the stable one either way.
      force_float32_reductions: accepted; sums are in at least float32 either way.
      reduction_axes: the axes that are reduced, none of them a feature axis; None: all but the first and the feature axes.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.instance_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])  # one sample, two positions, two channels
      >>> y, variables = jnn.InstanceNorm().init_with_output(jax.random.key(0), x)
      >>> y.round(3).tolist()
      [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    feature_axes: Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    reduction_axes: Axes | None = None
    activation: Activation | None = None
    save: Save = "input"

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Normalizes x; `mask` broadcasts against it, and what it counts enters the statistics."""
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            check_keeps_batch(self.reduction_axes, features, x.ndim)
            shape = feature_shape(x, features, "feature_axes")
            scale, bias = scale_param(self, shape), bias_param(self, shape)
            return instance_norm(
                x,
                scale,
                bias,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                **merged_axes(self, not self.is_initializing()),
                activation=self.activation,
                dtype=result_dtype(given, scale, bias, dtype=self.dtype),
                save=self.save,
            )

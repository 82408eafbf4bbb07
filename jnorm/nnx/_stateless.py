"""Norms that hold a scale and a bias only."""

from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import check_groups, check_keeps_batch, distinct_axes, floating
from .._norms.group_norm import group_norm, number_of_groups
from .._norms.instance_norm import instance_norm
from .._norms.layer_norm import layer_norm, rms_norm
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Mask, Save
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
class LayerNorm(nnx.Module):
    """Layer normalization: :func:`jnorm.layer_norm` with its scale and bias as parameters, in place of `flax.nnx.LayerNorm`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      epsilon: added to the variance.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
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
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.layer_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.LayerNorm(3, rngs=nnx.Rngs(0))
      >>> print(np.asarray(layer(jnp.array([1.0, 2.0, 3.0]))).round(3))
      [-1.225  0.     1.225]
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
        save: Save = "input",
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
        self.save: Save = save

    def __call__(self, x: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Normalizes x; `mask` broadcasts against it, and what it counts enters the statistics."""
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = shape_of_features(self, x, features, "feature_axes")
            scale, bias = value(self.scale, shape), value(self.bias, shape)
            return layer_norm(
                x,
                scale,
                bias,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                dtype=y_dtype(self, given, affine=(scale, bias)),
                save=self.save,
            )


@final
class RMSNorm(nnx.Module):
    """Root-mean-square normalization: :func:`jnorm.rms_norm` with its scale as a parameter, in place of `flax.nnx.RMSNorm`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      epsilon: added to the mean square.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
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
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.rms_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> print(np.asarray(jnx.RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([3.0, 4.0]))).round(3))
      [0.849 1.131]
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
        save: Save = "input",
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
        self.save: Save = save

    def __call__(self, x: jax.Array, mask: Mask | None = None) -> jax.Array:
        """Normalizes x; `mask` broadcasts against it, and what it counts enters the statistics."""
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            scale = value(self.scale, shape_of_features(self, x, features, "feature_axes"))
            return rms_norm(
                x,
                scale,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                dtype=y_dtype(self, given, affine=(scale,)),
                save=self.save,
            )


@final
class GroupNorm(nnx.Module):
    """Group normalization: :func:`jnorm.group_norm` with its scale and bias as parameters, in place of `flax.nnx.GroupNorm`.

    Args:
      num_features: the number of channels.
      num_groups: number of groups of contiguous channels; None with `group_size`.
      group_size: channels in a group.
      epsilon: added to the variance.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes that are reduced, the channel axis (reduced within groups) among them; None: all but the first.
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the variance is the stable one either way.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      feature_axes: the channel axis, one.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.group_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.GroupNorm(8, num_groups=2, activation="relu", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 4, 4, 8))).shape
      (1, 4, 4, 8)
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        reduction_axes: Axes | None = None,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        feature_axes: int = -1,
        activation: Activation | None = None,
        save: Save = "input",
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        with errors_of(self):
            check_groups(num_groups, group_size)
            self.num_groups = number_of_groups(num_features, num_groups, group_size)
        self.group_size = num_features // self.num_groups
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = static(reduction_axes)
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.feature_axes = static(feature_axes)
        self.activation = activation
        self.save: Save = save

    def __call__(self, x: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Normalizes x; `mask` broadcasts against it, and what it counts enters the statistics."""
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            shape = shape_of_features(self, x, self.feature_axes, "feature_axes")
            scale, bias = value(self.scale, shape), value(self.bias, shape)
            return group_norm(
                x,
                scale,
                bias,
                num_groups=self.num_groups,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=self.feature_axes,
                epsilon=self.epsilon,
                mask=mask,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                activation=self.activation,
                dtype=y_dtype(self, given, affine=(scale, bias)),
                save=self.save,
            )


@final
class InstanceNorm(nnx.Module):
    """Instance normalization: :func:`jnorm.instance_norm` with its scale and bias as parameters, in place of `flax.nnx.InstanceNorm`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      epsilon: added to the variance.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axes along which scale and bias vary, not the first.
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the variance is the stable one either way.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      reduction_axes: the axes that are reduced, none of them a feature axis; None: all but the first and the feature axes.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.instance_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])  # one sample, two positions, two channels
      >>> jnx.InstanceNorm(2, rngs=nnx.Rngs(0))(x).round(3).tolist()
      [[[-1.0, -1.0], [1.0, 1.0]]]
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
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        reduction_axes: Axes | None = None,
        activation: Activation | None = None,
        save: Save = "input",
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.feature_axes = static(feature_axes)
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.reduction_axes = static(reduction_axes)
        self.activation = activation
        self.save: Save = save

    def __call__(self, x: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Normalizes x; `mask` broadcasts against it, and what it counts enters the statistics."""
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            check_keeps_batch(self.reduction_axes, features, x.ndim)
            shape = shape_of_features(self, x, features, "feature_axes")
            scale, bias = value(self.scale, shape), value(self.bias, shape)
            return instance_norm(
                x,
                scale,
                bias,
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                activation=self.activation,
                dtype=y_dtype(self, given, affine=(scale, bias)),
                save=self.save,
            )

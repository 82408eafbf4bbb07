"""Norms that hold running statistics, and a scale and a bias."""

from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import check_keeps_batch, distinct_axes, floating
from .._norms.batch_norm import batch_norm, batch_norm_state
from .._norms.tracked_instance_norm import tracked_instance_norm
from .._pipeline.values import as_array
from .._stats import Stats
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Mask, Momentum, Save
from ._arguments import running_arguments, set_running_view
from ._variables import (
    NO_METADATA,
    Initializer,
    Metadata,
    PromoteDtype,
    affine_param,
    errors_of,
    promote_dtype,
    set_state,
    shape_of_features,
    static,
    write_state,
)


@final
class BatchNorm(nnx.Module):
    """Batch normalization: :func:`jnorm.batch_norm` with its state as variables, in place of `flax.nnx.BatchNorm`.

    "mean", "var" and, with `track_count`, "count" are `nnx.BatchStat`; "scale" and "bias" are `nnx.Param`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      use_running_average: normalize with the running statistics (evaluation); what :meth:`train` and :meth:`eval` set. None: to be given
        to the call.
      axis: the feature axis or axes; all others are reduced.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      epsilon: added to the variance.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count; not needed in evaluation.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the variance is the stable one either way.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      update_running: whether the running statistics move; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: the variance that enters the running one is the biased one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.batch_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
      >>> layer.mean[...].tolist()
      [1.0, 2.0]
      >>> layer.eval()
      >>> y = layer(jnp.array([[1.0, 2.0]]))  # with the running statistics
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array]  # with track_count

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        update_running: bool | None = None,
        track_count: bool = False,
        running_var_correction: int | float = 0,
        activation: Activation | None = None,
        save: Save = "input",
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        set_state(self, batch_norm_state(num_features, track_count=track_count))
        self.use_running_average = use_running_average
        self.axis = static(axis)
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.update_running = update_running
        self.track_count = track_count
        self.running_var_correction = running_var_correction
        self.activation = activation
        self.save: Save = save

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: Mask | None = None,
        update_running: bool | None = None,
        momentum: Momentum = None,
        residual: jax.Array | None = None,
        statistics: Stats | None = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: floating, complex or integer.
          use_running_average: None: the constructor's.
          mask: broadcasts against x; nonzero counts.
          update_running: None: the constructor's.
          momentum: a float or a traced scalar; None: the constructor's. 1 with `track_count` is the cumulative average.
          residual: of x's shape, added before the activation.
          statistics: of a larger batch that x is a part of, to normalize with in place of those of x; see :func:`jnorm.batch_norm`.
            They are of the shape of x's feature axes, and merged over devices already: no axis needs to be bound.

        Returns:
          y of x's shape.
        """
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.axis, x.ndim)
            shape = shape_of_features(self, x, features, "axis")
            call = running_arguments(self, BatchNormState, given, x, shape, use_running_average, update_running, momentum, statistics)
            correction = self.running_var_correction
            y, state = batch_norm(x, **call, running_var_correction=correction, feature_axes=features, mask=mask, residual=residual)
            write_state(self, call["state"], state)
            return y

    def set_view(self, use_running_average: bool | None = None, update_running: bool | None = None) -> None:
        """What `flax.nnx.view` sets.

        Args:
          use_running_average: normalize with the running statistics (evaluation).
          update_running: whether the running statistics move.
        """
        set_running_view(self, use_running_average, update_running)


@final
class TrackedInstanceNorm(nnx.Module):
    """Instance normalization with running statistics: :func:`jnorm.tracked_instance_norm` with its state as variables.

    The variables are those of :class:`BatchNorm`. Training is instance normalization; evaluation uses the running statistics.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      use_running_average: normalize with the running statistics (evaluation); what :meth:`train` and :meth:`eval` set. None: to be given
        to the call.
      feature_axes: the axes along which scale and bias vary, not the first.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      epsilon: added to the variance.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes over which the reduced axes are split; not the one that the batch is split over.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the variance is the stable one either way.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      update_running: whether the running statistics move; None: exactly when the samples' own statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: each sample's variance enters times n / max(n - correction, 1); 1 is PyTorch's.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      reduction_axes: the axes that are reduced, none of them a feature axis; None: all but the first and the feature axes.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.tracked_instance_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.
      batch_axis_name: named axis or axes that the batch is split over: the update averages over the samples of all devices.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.TrackedInstanceNorm(1, momentum=0.0, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[[1.0], [3.0]], [[5.0], [9.0]]]))  # two samples, two positions, one channel
      >>> layer.mean[...].tolist(), layer.var[...].tolist()
      ([4.5], [2.5])
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array]  # with track_count

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        feature_axes: Axes = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        update_running: bool | None = None,
        track_count: bool = False,
        running_var_correction: int | float = 0,
        activation: Activation | None = None,
        reduction_axes: Axes | None = None,
        save: Save = "input",
        batch_axis_name: AxisName | None = None,
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        set_state(self, batch_norm_state(num_features, track_count=track_count))
        self.use_running_average = use_running_average
        self.feature_axes = static(feature_axes)
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.update_running = update_running
        self.track_count = track_count
        self.running_var_correction = running_var_correction
        self.activation = activation
        self.reduction_axes = static(reduction_axes)
        self.save: Save = save
        self.batch_axis_name = static(batch_axis_name)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: Mask | None = None,
        update_running: bool | None = None,
        momentum: Momentum = None,
    ) -> jax.Array:
        """Normalizes x; the arguments are those of :meth:`BatchNorm.__call__`."""
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            check_keeps_batch(self.reduction_axes, features, x.ndim)
            shape = shape_of_features(self, x, features, "feature_axes")
            call = running_arguments(self, BatchNormState, given, x, shape, use_running_average, update_running, momentum)
            call |= {"running_var_correction": self.running_var_correction, "reduction_axes": distinct_axes(self.reduction_axes, x.ndim)}
            y, state = tracked_instance_norm(x, **call, feature_axes=features, mask=mask)
            write_state(self, call["state"], state)
            return y

    def set_view(self, use_running_average: bool | None = None, update_running: bool | None = None) -> None:
        """What `flax.nnx.view` sets.

        Args:
          use_running_average: normalize with the running statistics (evaluation).
          update_running: whether the running statistics move.
        """
        set_running_view(self, use_running_average, update_running)

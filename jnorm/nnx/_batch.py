"""Variants of batch normalization that hold running statistics of their own kind."""

from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import distinct_axes, floating
from .._norms.batch_renorm import batch_renorm, batch_renorm_state
from .._norms.mean_only_batch_norm import mean_only_batch_norm, mean_only_batch_norm_state
from .._pipeline.arguments import check_x
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchRenormState, Limit, Mask, MeanState, Momentum, Save
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
class BatchRenorm(nnx.Module):
    """Batch renormalization: :func:`jnorm.batch_renorm` with its state as variables.

    "mean", "std" and, with `track_count`, "count" are `nnx.BatchStat`; "scale" and "bias" are `nnx.Param`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      use_running_average: normalize with the running statistics (evaluation); what :meth:`train` and :meth:`eval` set. None: to be given
        to the call.
      feature_axes: the axes that keep their own statistics; all others are reduced.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      epsilon: added to the batch's variance; the running standard deviation has it in it.
      r_max: the limit of r and 1/r, at least 1. 1 with `d_max=0` is batch normalization.
      d_max: the limit of abs(d), at least 0.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count; not needed in evaluation.
      axis_index_groups: groups of equal size within that axis.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      update_running: whether the running statistics move; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.batch_renorm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.BatchRenorm(2, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0, 2.0], [3.0, 6.0]]), r_max=1.5, d_max=0.5)
      >>> layer.mean[...].tolist()
      [1.0, 2.0]
      >>> layer.eval()
      >>> y = layer(jnp.array([[1.0, 2.0]]))  # with the running statistics
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    mean: nnx.BatchStat[jax.Array]
    std: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array]  # with track_count

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        feature_axes: Axes = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-3,
        r_max: float = 3.0,
        d_max: float = 5.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        update_running: bool | None = None,
        track_count: bool = False,
        activation: Activation | None = None,
        save: Save = "input",
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        set_state(self, batch_renorm_state(num_features, track_count=track_count))
        self.use_running_average = use_running_average
        self.feature_axes = static(feature_axes)
        self.momentum = momentum
        self.epsilon = epsilon
        self.r_max = r_max
        self.d_max = d_max
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)
        self.promote_dtype = promote_dtype
        self.update_running = update_running
        self.track_count = track_count
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
        r_max: Limit | None = None,
        d_max: Limit | None = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: floating or integer.
          use_running_average: None: the constructor's.
          mask: broadcasts against x; nonzero counts.
          update_running: None: the constructor's.
          momentum: a float or a traced scalar; None: the constructor's. 1 with `track_count` is the cumulative average.
          residual: of x's shape, added before the activation.
          r_max: a float or a traced scalar, such as a schedule's; None: the constructor's.
          d_max: the same.

        Returns:
          y of x's shape.
        """
        with errors_of(self):
            given = as_array(x)
            x = check_x(floating(given, self.dtype))
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = shape_of_features(self, x, features, "feature_axes")
            call = running_arguments(self, BatchRenormState, given, x, shape, use_running_average, update_running, momentum)
            call |= {"r_max": self.r_max if r_max is None else r_max, "d_max": self.d_max if d_max is None else d_max}
            y, state = batch_renorm(x, **call, feature_axes=features, mask=mask, residual=residual)
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
class MeanOnlyBatchNorm(nnx.Module):
    """Mean-only batch normalization: :func:`jnorm.mean_only_batch_norm` with its state as variables.

    "mean" and, with `track_count`, "count" are `nnx.BatchStat`; "bias" is an `nnx.Param`. The layer before, such as a
    :class:`WeightNorm`, needs no bias.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      use_running_average: subtract the running mean (evaluation); what :meth:`train` and :meth:`eval` set. None: to be given to the call.
      feature_axes: the axes that keep their own mean; all others are reduced.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      dtype: y's; None: what `promote_dtype` gives. The mean is of x as given, in at least float32, whatever it is.
      param_dtype: of the bias.
      use_bias: add a bias.
      bias_init: initializer of the bias.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge the mean over, by count; not needed in evaluation.
      axis_index_groups: groups of equal size within that axis.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes the bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      update_running: whether the running mean moves; None: exactly when the batch's is subtracted.
      track_count: keep a count, for debiased and cumulative averages.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.mean_only_batch_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> rngs = nnx.Rngs(0)
      >>> dense = jnx.WeightNorm(nnx.Linear(2, 4, use_bias=False, rngs=rngs), rngs=rngs)
      >>> layer = jnx.MeanOnlyBatchNorm(4, rngs=rngs)
      >>> layer(dense(jnp.array([[1.0, 2.0], [3.0, 6.0]]))).mean(0).tolist()
      [0.0, 0.0, 0.0, 0.0]
    """

    bias: nnx.Param[jax.Array] | None
    mean: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array]  # with track_count

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        feature_axes: Axes = -1,
        momentum: Momentum = 0.99,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        update_running: bool | None = None,
        track_count: bool = False,
        activation: Activation | None = None,
        save: Save = "input",
    ) -> None:
        self.num_features = num_features
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        set_state(self, mean_only_batch_norm_state(num_features, track_count=track_count))
        self.use_running_average = use_running_average
        self.feature_axes = static(feature_axes)
        self.momentum = momentum
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)
        self.promote_dtype = promote_dtype
        self.update_running = update_running
        self.track_count = track_count
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
    ) -> jax.Array:
        """Subtracts the mean; the arguments are those of :meth:`BatchNorm.__call__`, without complex x."""
        with errors_of(self):
            given = as_array(x)
            x = check_x(floating(given, self.dtype))
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = shape_of_features(self, x, features, "feature_axes")
            call = running_arguments(self, MeanState, given, x, shape, use_running_average, update_running, momentum)
            y, state = mean_only_batch_norm(x, **call, feature_axes=features, mask=mask, residual=residual)
            write_state(self, call["state"], state)
            return y

    def set_view(self, use_running_average: bool | None = None, update_running: bool | None = None) -> None:
        """What `flax.nnx.view` sets.

        Args:
          use_running_average: subtract the running mean (evaluation).
          update_running: whether the running mean moves.
        """
        set_running_view(self, use_running_average, update_running)

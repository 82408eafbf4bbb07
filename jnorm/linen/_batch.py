"""Variants of batch normalization that hold running statistics of their own kind."""

from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import distinct_axes, feature_shape, floating
from .._norms.batch_renorm import batch_renorm, batch_renorm_state
from .._norms.mean_only_batch_norm import mean_only_batch_norm, mean_only_batch_norm_state
from .._pipeline.arguments import check_x
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchRenormState, Limit, Mask, MeanState, Momentum, Save
from ._arguments import running_arguments, running_variables
from ._variables import Initializer, errors_of


@final
class BatchRenorm(nn.Module):
    """Batch renormalization: :func:`jnorm.batch_renorm` with its state as variables.

    The collection "batch_stats" holds "mean", "std" and, with `track_count`, "count"; "params" holds "scale" and "bias". Initialization
    updates nothing and merges nothing over devices.

    Args:
      use_running_average: normalize with the running statistics (evaluation). Give it here or to the call.
      feature_axes: the axes that keep their own statistics; all others are reduced.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      epsilon: added to the batch's variance; the running standard deviation has it in it.
      r_max: the limit of r and 1/r, at least 1. 1 with `d_max=0` is batch normalization.
      d_max: the limit of abs(d), at least 0.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count; not needed in evaluation.
      axis_index_groups: groups of equal size within that axis.
      update_running: whether the running statistics move; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.batch_renorm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> layer = jnn.BatchRenorm(momentum=0.5)
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(variables, x, use_running_average=False, r_max=1.5, d_max=0.5, mutable=["batch_stats"])
      >>> updates["batch_stats"]["mean"].tolist()
      [1.0, 2.0]
      >>> y = layer.apply(variables | updates, x, use_running_average=True)
    """

    use_running_average: bool | None = None
    feature_axes: Axes = -1
    momentum: Momentum = 0.99
    epsilon: float = 1e-3
    r_max: float = 3.0
    d_max: float = 5.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    update_running: bool | None = None
    track_count: bool = False
    activation: Activation | None = None
    save: Save = "input"

    @nn.compact
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
          use_running_average: as in the constructor; to be given in one of the two.
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
            variables = running_variables(self, batch_renorm_state, BatchRenormState, x, feature_shape(x, features, "feature_axes"))
            call = running_arguments(self, given, x, variables, use_running_average, update_running, momentum)
            call |= {"r_max": self.r_max if r_max is None else r_max, "d_max": self.d_max if d_max is None else d_max}
            y, state = batch_renorm(x, **call, feature_axes=features, mask=mask, residual=residual)
            variables.write(call["state"], state)
            return y


@final
class MeanOnlyBatchNorm(nn.Module):
    """Mean-only batch normalization: :func:`jnorm.mean_only_batch_norm` with its state as variables.

    The collection "batch_stats" holds "mean" and, with `track_count`, "count"; "params" holds "bias". Initialization updates nothing and
    merges nothing over devices. The layer before, such as a :class:`WeightNorm`, needs no bias.

    Args:
      use_running_average: subtract the running mean (evaluation). Give it here or to the call.
      feature_axes: the axes that keep their own mean; all others are reduced.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      dtype: y's; None: what x and bias promote to. The mean is in at least float32 whatever it is.
      param_dtype: of the bias.
      use_bias: add a bias.
      bias_init: initializer of the bias.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge the mean over, by count; not needed in evaluation.
      axis_index_groups: groups of equal size within that axis.
      update_running: whether the running mean moves; None: exactly when the batch's is subtracted.
      track_count: keep a count, for debiased and cumulative averages.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.mean_only_batch_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> model = nn.Sequential([jnn.WeightNorm(nn.Dense(4, use_bias=False)), jnn.MeanOnlyBatchNorm(use_running_average=False)])
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> y, variables = model.init_with_output(jax.random.key(0), x)
      >>> y.mean(0).tolist()
      [0.0, 0.0, 0.0, 0.0]
    """

    use_running_average: bool | None = None
    feature_axes: Axes = -1
    momentum: Momentum = 0.99
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    bias_init: Initializer = nn.initializers.zeros
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    update_running: bool | None = None
    track_count: bool = False
    activation: Activation | None = None
    save: Save = "input"

    @nn.compact
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
            variables = running_variables(self, mean_only_batch_norm_state, MeanState, x, feature_shape(x, features, "feature_axes"))
            call = running_arguments(self, given, x, variables, use_running_average, update_running, momentum)
            y, state = mean_only_batch_norm(x, **call, feature_axes=features, mask=mask, residual=residual)
            variables.write(call["state"], state)
            return y

"""Norms that hold running statistics, and a scale and a bias."""

from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import check_keeps_batch, distinct_axes, feature_shape, floating
from .._norms.batch_norm import batch_norm, batch_norm_state
from .._norms.tracked_instance_norm import tracked_instance_norm
from .._pipeline.values import as_array
from .._stats import Stats
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Mask, Momentum, Save
from ._arguments import running_arguments, running_variables
from ._variables import Initializer, errors_of


@final
class BatchNorm(nn.Module):
    """Batch normalization: :func:`jnorm.batch_norm` with its state as variables, in place of `flax.linen.BatchNorm`.

    The collection "batch_stats" holds "mean", "var" and, with `track_count`, "count"; "params" holds "scale" and "bias". Initialization
    updates nothing and merges nothing over devices.

    Args:
      use_running_average: normalize with the running statistics (evaluation). Give it here or to the call.
      axis: the feature axis or axes; all others are reduced.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      epsilon: added to the variance.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count; not needed in evaluation.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the variance is the stable one either way.
      force_float32_reductions: sums are in at least float32 either way. False: running statistics in `param_dtype`, where that is
        float32 or wider.
      update_running: whether the running statistics move; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: the variance that enters the running one is the biased one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.batch_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> layer = jnn.BatchNorm(momentum=0.5)
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> updates["batch_stats"]["mean"].tolist()
      [1.0, 2.0]
      >>> y = layer.apply(variables | updates, x, use_running_average=True)
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    update_running: bool | None = None
    track_count: bool = False
    running_var_correction: int | float = 0
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
        statistics: Stats | None = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: floating, complex or integer.
          use_running_average: as in the constructor; to be given in one of the two.
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
            variables = running_variables(self, batch_norm_state, BatchNormState, x, feature_shape(x, features, "axis"))
            call = running_arguments(self, given, x, variables, use_running_average, update_running, momentum, statistics)
            correction = self.running_var_correction
            y, state = batch_norm(x, **call, running_var_correction=correction, feature_axes=features, mask=mask, residual=residual)
            variables.write(call["state"], state)
            return y


@final
class TrackedInstanceNorm(nn.Module):
    """Instance normalization with running statistics: :func:`jnorm.tracked_instance_norm` with its state as variables.

    The variables are those of :class:`BatchNorm`. Training is instance normalization; evaluation uses the running statistics.

    Args:
      use_running_average: normalize with the running statistics (evaluation). Give it here or to the call.
      feature_axes: the axes along which scale, bias and state vary, not the first.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      epsilon: added to the variance.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes over which the reduced axes are split; not the one that the batch is split over.
      axis_index_groups: groups of equal size within that axis.
      use_fast_variance: accepted; the variance is the stable one either way.
      force_float32_reductions: as in :class:`BatchNorm`.
      update_running: whether the running statistics move; None: exactly when the samples' own statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: each sample's variance enters times n / max(n - correction, 1); 1 is PyTorch's.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      reduction_axes: the axes that are reduced, none of them a feature axis; None: all but the first and the feature axes.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.tracked_instance_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.
      batch_axis_name: named axis or axes that the batch is split over: the update averages over the samples of all devices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [9.0]]])  # two samples, two positions, one channel
      >>> layer = jnn.TrackedInstanceNorm(use_running_average=False, momentum=0.0)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> updates["batch_stats"]["mean"].tolist(), updates["batch_stats"]["var"].tolist()
      ([4.5], [2.5])
    """

    use_running_average: bool | None = None
    feature_axes: Axes = -1
    momentum: Momentum = 0.99
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    update_running: bool | None = None
    track_count: bool = False
    running_var_correction: int | float = 0
    activation: Activation | None = None
    reduction_axes: Axes | None = None
    save: Save = "input"
    batch_axis_name: AxisName | None = None

    @nn.compact
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
            variables = running_variables(self, batch_norm_state, BatchNormState, x, feature_shape(x, features, "feature_axes"))
            call = running_arguments(self, given, x, variables, use_running_average, update_running, momentum)
            call |= {"running_var_correction": self.running_var_correction, "reduction_axes": distinct_axes(self.reduction_axes, x.ndim)}
            y, state = tracked_instance_norm(x, **call, feature_axes=features, mask=mask)
            variables.write(call["state"], state)
            return y

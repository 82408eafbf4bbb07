"""Ghost batch normalization as a module."""

from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import distinct_axes, floating
from .._norms.batch_norm import batch_norm_state
from .._norms.ghost_batch_norm import ghost_batch_norm
from .._pipeline.arguments import check_x
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Grouping, GroupUpdate, Mask, Momentum, Remainder, Save
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
class GhostBatchNorm(nnx.Module):
    """Ghost batch normalization: :func:`jnorm.ghost_batch_norm` with its state as variables.

    The variables are those of :class:`BatchNorm`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      group_size: the number of examples that are normalized together. In evaluation it has no effect.
      grouping: "consecutive": example i is in group i // group_size. "strided": in group i mod K, of K groups.
      remainder: "error" refuses a batch that `group_size` does not divide; "smaller" makes groups smaller.
      update: "mean": one step of the running average, with the mean over the groups. "each": one step for each group, in order.
      use_running_average: normalize with the running statistics (evaluation); what :meth:`train` and :meth:`eval` set. None: to be given
        to the call.
      feature_axes: the axes that keep their own statistics, not the first.
      momentum: the fraction of the old running value that is kept in a step. None: the cumulative average, which needs `track_count`.
      epsilon: added to the variance.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` that the batch is split over, for the update alone.
      axis_index_groups: groups of equal size within that axis.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      update_running: whether the running statistics move; None: exactly when the groups' statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: a group's variance enters the running one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.batch_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> x = jnp.array([[1.0], [3.0], [5.0], [9.0]])
      >>> layer = jnx.GhostBatchNorm(1, group_size=2, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = layer(x)
      >>> layer.mean[...].tolist(), layer.var[...].tolist()
      ([2.25], [1.75])
      >>> layer.eval()
      >>> y = layer(x[:3])  # with the running statistics
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
        group_size: int,
        grouping: Grouping = "consecutive",
        remainder: Remainder = "error",
        update: GroupUpdate = "mean",
        use_running_average: bool | None = False,
        feature_axes: Axes = -1,
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
        self.group_size = group_size
        self.grouping: Grouping = grouping
        self.remainder: Remainder = remainder
        self.update: GroupUpdate = update
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
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: floating or integer.
          use_running_average: None: the constructor's.
          mask: broadcasts against x; nonzero counts.
          update_running: None: the constructor's.
          momentum: a float or a traced scalar; None: the constructor's. 1 with `track_count` is the cumulative average.
          residual: of x's shape, added before the activation.

        Returns:
          y of x's shape.
        """
        with errors_of(self):
            given = as_array(x)
            x = check_x(floating(given, self.dtype))
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = shape_of_features(self, x, features, "feature_axes")
            call = running_arguments(self, BatchNormState, given, x, shape, use_running_average, update_running, momentum)
            call |= {"group_size": self.group_size, "grouping": self.grouping, "remainder": self.remainder, "update": self.update}
            correction = self.running_var_correction
            y, state = ghost_batch_norm(x, **call, running_var_correction=correction, feature_axes=features, mask=mask, residual=residual)
            write_state(self, call["state"], state)
            return y

    def set_view(self, use_running_average: bool | None = None, update_running: bool | None = None) -> None:
        """What `flax.nnx.view` sets.

        Args:
          use_running_average: normalize with the running statistics (evaluation).
          update_running: whether the running statistics move.
        """
        set_running_view(self, use_running_average, update_running)

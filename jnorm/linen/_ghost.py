"""Ghost batch normalization as a module."""

from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import distinct_axes, feature_shape, floating
from .._norms.batch_norm import batch_norm_state
from .._norms.ghost_batch_norm import check_group_size, ghost_batch_norm
from .._pipeline.arguments import check_x
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Grouping, GroupUpdate, Mask, Momentum, Remainder, Save
from ._arguments import running_arguments, running_variables
from ._variables import Initializer, errors_of


@final
class GhostBatchNorm(nn.Module):
    """Ghost batch normalization: :func:`jnorm.ghost_batch_norm` with its state as variables.

    The variables are those of :class:`BatchNorm`. Initialization takes any number of examples, updates nothing and merges nothing over
    devices.

    Args:
      group_size: the number of examples that are normalized together. In evaluation it has no effect.
      grouping: "consecutive": example i is in group i // group_size. "strided": in group i mod K, of K groups.
      remainder: "error" refuses a batch that `group_size` does not divide; "smaller" makes groups smaller.
      update: "mean": one step of the running average, with the mean over the groups. "each": one step for each group, in order.
      use_running_average: normalize with the running statistics (evaluation). Give it here or to the call.
      feature_axes: the axes that keep their own statistics, not the first.
      momentum: the fraction of the old running value that is kept in a step. None: the cumulative average, which needs `track_count`.
      epsilon: added to the variance.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` that the batch is split over, for the update alone.
      axis_index_groups: groups of equal size within that axis.
      update_running: whether the running statistics move; None: exactly when the groups' statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: a group's variance enters the running one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.batch_norm`. With bfloat16 x and
        float32 parameters it needs `dtype=jnp.bfloat16`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> x = jnp.array([[1.0], [3.0], [5.0], [9.0]])
      >>> layer = jnn.GhostBatchNorm(group_size=2, momentum=0.5)
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> updates["batch_stats"]["mean"].tolist(), updates["batch_stats"]["var"].tolist()
      ([2.25], [1.75])
      >>> y = layer.apply(variables | updates, x[:3], use_running_average=True)
    """

    group_size: int
    grouping: Grouping = "consecutive"
    remainder: Remainder = "error"
    update: GroupUpdate = "mean"
    use_running_average: bool | None = None
    feature_axes: Axes = -1
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
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: floating or integer.
          use_running_average: as in the constructor; to be given in one of the two.
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
            variables = running_variables(self, batch_norm_state, BatchNormState, x, feature_shape(x, features, "feature_axes"))
            call = running_arguments(self, given, x, variables, use_running_average, update_running, momentum)
            call |= {"grouping": self.grouping, "update": self.update, "running_var_correction": self.running_var_correction}
            call |= {"group_size": self.group_size, "remainder": self.remainder}
            if self.is_initializing():
                # Any number of examples will do to initialize with.
                check_group_size(self.group_size)
                call |= {"group_size": max(min(self.group_size, len(x)), 1), "remainder": "smaller"}
                call["use_running_average"] = call["use_running_average"] or not len(x)
            y, state = ghost_batch_norm(x, **call, feature_axes=features, mask=mask, residual=residual)
            variables.write(call["state"], state)
            return y

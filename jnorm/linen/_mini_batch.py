"""Cross mini-batch normalization, whose state holds the statistics of a batch that comes in mini-batches."""

from typing import Any, Literal, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import distinct_axes, feature_shape, floating
from .._norms.cross_mini_batch_norm import cross_mini_batch_norm, cross_mini_batch_norm_state
from .._pipeline.arguments import check_x
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, CrossMiniBatchState, Mask, Momentum
from ._arguments import running_arguments, running_variables
from ._variables import Initializer, errors_of


@final
class CrossMiniBatchNorm(nn.Module):
    """Cross mini-batch normalization: :func:`jnorm.cross_mini_batch_norm` with its state as variables.

    It belongs in a loop that accumulates the gradients of a batch's mini-batches, which carries the collection "batch_stats": that holds
    "mean", "var", "batch_mean", "batch_var", "batch_count", "index" and, with `track_count`, "count". "params" holds "scale" and "bias".
    Initialization updates nothing and merges nothing over devices.

    Args:
      num_mini_batches: how many mini-batches make a batch. Also to be given to the call.
      use_running_average: normalize with the running statistics (evaluation). Give it here or to the call.
      feature_axes: the axes that keep their own statistics; all others are reduced.
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
      gradient: "exact", or "published", as if all values so far were the mini-batch's own.
      update: the running statistics move at "each" mini-batch, or at the "last" one of a batch only.
      update_running: whether the state moves; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: the variance that enters the running one is the biased one times N / max(N - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> layer = jnn.CrossMiniBatchNorm(num_mini_batches=2, use_running_average=False)
      >>> batch = jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]])  # two mini-batches of two examples
      >>> variables = layer.init(jax.random.key(0), batch[0])
      >>> def step(stats, x):
      ...     y, updates = layer.apply(variables | {"batch_stats": stats}, x, mutable=["batch_stats"])
      ...     return updates["batch_stats"], y
      >>> stats, y = jax.lax.scan(step, variables["batch_stats"], batch)
      >>> stats["batch_mean"].tolist(), stats["batch_var"].tolist()
      ([3.0], [3.5])
    """

    num_mini_batches: int
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
    gradient: Literal["exact", "published"] = "exact"
    update: Literal["each", "last"] = "each"
    update_running: bool | None = None
    track_count: bool = False
    running_var_correction: int | float = 0
    activation: Activation | None = None

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
        num_mini_batches: int | jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes a mini-batch.

        Args:
          x: floating or integer.
          use_running_average: as in the constructor; to be given in one of the two.
          mask: broadcasts against x; nonzero counts.
          update_running: None: the constructor's.
          momentum: a float or a traced scalar; None: the constructor's. 1 with `track_count` is the cumulative average.
          residual: of x's shape, added before the activation.
          num_mini_batches: an int or a traced integer, such as for a batch that is shorter; None: the constructor's.

        Returns:
          y of x's shape.
        """
        with errors_of(self):
            given = as_array(x)
            x = check_x(floating(given, self.dtype))
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = feature_shape(x, features, "feature_axes")
            variables = running_variables(self, cross_mini_batch_norm_state, CrossMiniBatchState, x, shape)
            call = running_arguments(self, given, x, variables, use_running_average, update_running, momentum)
            y, state = cross_mini_batch_norm(
                x,
                **call,
                num_mini_batches=self.num_mini_batches if num_mini_batches is None else num_mini_batches,
                gradient=self.gradient,
                update=self.update,
                running_var_correction=self.running_var_correction,
                feature_axes=features,
                mask=mask,
                residual=residual,
            )
            variables.write(call["state"], state)
            return y

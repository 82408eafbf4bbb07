"""Batch normalization whose evaluation gives each sample's own statistics a share, as a module."""

from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import distinct_axes, feature_shape, floating, run_eval_norm
from .._norms.batch_norm import batch_norm_state
from .._norms.eval_norm_fit import KEYS, eval_norm_fit_state
from .._pipeline.arguments import check_x
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Mask, Momentum, Save, Weight
from ._arguments import running_arguments, running_variables
from ._variables import Initializer, StateVariables, errors_of


@final
class EvalNorm(nn.Module):
    """EvalNorm: trained as :class:`BatchNorm`, whose checkpoints fit, and evaluated as :func:`jnorm.eval_norm`.

    The variables are those of :class:`BatchNorm`; with `learn_weights`, "batch_stats" also holds the sums of :func:`jnorm.eval_norm_fit`.
    To load a checkpoint without them, keep those that `init` makes. Initialization updates nothing and merges nothing over devices.

    Args:
      mean_weight: the share of a sample's own mean in evaluation; 1 / N after training on batches of N. Give it here or to the call, or
        `learn_weights`.
      var_weight: the share of its own variance; None: as mean_weight.
      learn_weights: fit both, per channel, to the batches of training calls that move the running statistics. Sums are forgotten by the
        same momentum. It reads x once more. Until something is fitted both are 0: evaluation is then that of plain batch normalization.
      use_running_average: evaluate. Give it here or to the call.
      feature_axes: the axes that keep their own statistics, not the first.
      reduction_axes: the axes of a sample's positions; None: all but the first and the feature axes. Training reduces the batch too.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      epsilon: added to the variance.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` that the batch is split over, to merge its statistics in training; not
        needed in evaluation, where a sample must be whole.
      axis_index_groups: groups of equal size within that axis.
      update_running: whether the running statistics move; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: the variance that enters the running one is the biased one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: in training, "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.batch_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [9.0]]])  # two samples, two positions, one channel
      >>> layer = jnn.EvalNorm(mean_weight=1 / 2, momentum=0.0)
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
      >>> updates["batch_stats"]["mean"].tolist(), updates["batch_stats"]["var"].tolist()
      ([4.5], [8.75])
      >>> y = layer.apply(variables | updates, x, use_running_average=True)
    """

    mean_weight: float | None = None
    var_weight: float | None = None
    learn_weights: bool = False
    use_running_average: bool | None = None
    feature_axes: Axes = -1
    reduction_axes: Axes | None = None
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
        mean_weight: Weight | None = None,
        var_weight: Weight | None = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: floating or integer.
          use_running_average: as in the constructor; to be given in one of the two.
          mask: broadcasts against x; nonzero counts.
          update_running: None: the constructor's.
          momentum: a float or a traced scalar; None: the constructor's. 1 with `track_count` is the cumulative average.
          mean_weight: a number or of the shape of the features, maybe traced; None: the learned one, or the constructor's.
          var_weight: likewise; None: mean_weight where that is given here.

        Returns:
          y of x's shape.
        """
        with errors_of(self):
            given = as_array(x)
            x = check_x(floating(given, self.dtype))
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = feature_shape(x, features, "feature_axes")
            variables = running_variables(self, batch_norm_state, BatchNormState, x, shape)
            call = running_arguments(self, given, x, variables, use_running_average, update_running, momentum)
            sums = StateVariables(self, lambda: eval_norm_fit_state(shape), KEYS if self.learn_weights else ())
            fit, options = sums.read(), {"mask": mask, "features": features, "initializes": self.is_initializing()}
            y, state, new_fit = run_eval_norm(self, x, call, fit, (mean_weight, var_weight), **options)
            variables.write(call["state"], state)
            sums.write(fit, new_fit)
            return y

"""Batch normalization whose evaluation gives each sample's own statistics a share, as a module."""

from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import distinct_axes, floating, run_eval_norm
from .._norms.batch_norm import batch_norm_state
from .._norms.eval_norm_fit import KEYS, eval_norm_fit_state
from .._pipeline.arguments import check_x
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Mask, Momentum, Save, Weight
from ._arguments import running_arguments, set_running_view
from ._variables import (
    NO_METADATA,
    Initializer,
    Metadata,
    PromoteDtype,
    affine_param,
    errors_of,
    promote_dtype,
    read_state,
    set_state,
    shape_of_features,
    static,
    write_state,
)


@final
class EvalNorm(nnx.Module):
    """EvalNorm: trained as :class:`BatchNorm`, whose checkpoints fit, and evaluated as :func:`jnorm.eval_norm`.

    The variables are those of :class:`BatchNorm`; with `learn_weights` there are the sums of :func:`jnorm.eval_norm_fit` too. To load a
    checkpoint without them, keep those of the new module.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      mean_weight: the share of a sample's own mean in evaluation; 1 / N after training on batches of N. Give it here or to the call, or
        `learn_weights`.
      var_weight: the share of its own variance; None: as mean_weight.
      learn_weights: fit both, per channel, to the batches of training calls that move the running statistics. Sums are forgotten by the
        same momentum. It reads x once more. Until something is fitted both are 0: evaluation is then that of plain batch normalization.
      use_running_average: evaluate; what :meth:`train` and :meth:`eval` set. None: to be given to the call.
      feature_axes: the axes that keep their own statistics, not the first.
      reduction_axes: the axes of a sample's positions; None: all but the first and the feature axes. Training reduces the batch too.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      epsilon: added to the variance.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` that the batch is split over, to merge its statistics in training; not
        needed in evaluation, where a sample must be whole.
      axis_index_groups: groups of equal size within that axis.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      update_running: whether the running statistics move; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: the variance that enters the running one is the biased one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      save: in training, "output" keeps y, of x's dtype, instead of x for the backward pass; see :func:`jnorm.batch_norm`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [9.0]]])  # two samples, two positions, one channel
      >>> layer = jnx.EvalNorm(1, mean_weight=1 / 2, momentum=0.0, rngs=nnx.Rngs(0))
      >>> y = layer(x)
      >>> layer.mean[...].tolist(), layer.var[...].tolist()
      ([4.5], [8.75])
      >>> layer.eval()
      >>> y = layer(x)
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array]  # with track_count
    mean_product: nnx.BatchStat[jax.Array]  # this and the next with learn_weights
    mean_square: nnx.BatchStat[jax.Array]
    var_product: nnx.BatchStat[jax.Array]
    var_square: nnx.BatchStat[jax.Array]

    def __init__(
        self,
        num_features: int,
        *,
        mean_weight: float | None = None,
        var_weight: float | None = None,
        learn_weights: bool = False,
        use_running_average: bool | None = False,
        feature_axes: Axes = -1,
        reduction_axes: Axes | None = None,
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
        set_state(self, eval_norm_fit_state(num_features) if learn_weights else {})
        self.mean_weight = mean_weight
        self.var_weight = var_weight
        self.learn_weights = learn_weights
        self.use_running_average = use_running_average
        self.feature_axes = static(feature_axes)
        self.reduction_axes = static(reduction_axes)
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
        mean_weight: Weight | None = None,
        var_weight: Weight | None = None,
    ) -> jax.Array:
        """Normalizes x.

        Args:
          x: floating or integer.
          use_running_average: None: the constructor's.
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
            shape = shape_of_features(self, x, features, "feature_axes")
            call = running_arguments(self, BatchNormState, given, x, shape, use_running_average, update_running, momentum)
            fit = read_state(self, KEYS if self.learn_weights else (), shape)
            options = {"mask": mask, "features": features}
            y, state, new_fit = run_eval_norm(self, x, call, fit, (mean_weight, var_weight), **options)
            write_state(self, call["state"], state)
            write_state(self, fit, new_fit)
            return y

    def set_view(self, use_running_average: bool | None = None, update_running: bool | None = None) -> None:
        """What `flax.nnx.view` sets.

        Args:
          use_running_average: evaluate.
          update_running: whether the running statistics move.
        """
        set_running_view(self, use_running_average, update_running)

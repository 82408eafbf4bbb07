"""Cross mini-batch normalization, whose state holds the statistics of a batch that comes in mini-batches."""

from typing import Any, Literal, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import distinct_axes, floating
from .._norms.cross_mini_batch_norm import cross_mini_batch_norm, cross_mini_batch_norm_state
from .._pipeline.arguments import check_x
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, CrossMiniBatchState, Mask, Momentum
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
class CrossMiniBatchNorm(nnx.Module):
    """Cross mini-batch normalization: :func:`jnorm.cross_mini_batch_norm` with its state as variables.

    It belongs in a loop that accumulates the gradients of a batch's mini-batches; inside `nnx.scan` the module is carried. "mean", "var",
    "batch_mean", "batch_var", "batch_count", "index" and, with `track_count`, "count" are `nnx.BatchStat`; "scale" and "bias" are
    `nnx.Param`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      num_mini_batches: how many mini-batches make a batch. Also to be given to the call.
      use_running_average: normalize with the running statistics (evaluation); what :meth:`train` and :meth:`eval` set. None: to be given
        to the call.
      feature_axes: the axes that keep their own statistics; all others are reduced.
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
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      gradient: "exact", or "published", as if all values so far were the mini-batch's own.
      update: the running statistics move at "each" mini-batch, or at the "last" one of a batch only.
      update_running: whether the state moves; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: the variance that enters the running one is the biased one times N / max(N - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.CrossMiniBatchNorm(1, num_mini_batches=2, rngs=nnx.Rngs(0))
      >>> for x in jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]]):  # two mini-batches of two examples
      ...     y = layer(x)
      >>> layer.batch_mean[...].tolist(), layer.batch_var[...].tolist()
      ([3.0], [3.5])
      >>> layer.eval()
      >>> y = layer(jnp.array([[1.0]]))  # with the running statistics
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]
    batch_mean: nnx.BatchStat[jax.Array]
    batch_var: nnx.BatchStat[jax.Array]
    batch_count: nnx.BatchStat[jax.Array]
    index: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array]  # with track_count

    def __init__(
        self,
        num_features: int,
        *,
        num_mini_batches: int,
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
        gradient: Literal["exact", "published"] = "exact",
        update: Literal["each", "last"] = "each",
        update_running: bool | None = None,
        track_count: bool = False,
        running_var_correction: int | float = 0,
        activation: Activation | None = None,
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        set_state(self, cross_mini_batch_norm_state(num_features, track_count=track_count))
        self.num_mini_batches = num_mini_batches
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
        self.gradient: Literal["exact", "published"] = gradient
        self.update: Literal["each", "last"] = update
        self.update_running = update_running
        self.track_count = track_count
        self.running_var_correction = running_var_correction
        self.activation = activation

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
          use_running_average: None: the constructor's.
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
            shape = shape_of_features(self, x, features, "feature_axes")
            call = running_arguments(self, CrossMiniBatchState, given, x, shape, use_running_average, update_running, momentum)
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
            write_state(self, call["state"], state)
            return y

    def set_view(self, use_running_average: bool | None = None, update_running: bool | None = None) -> None:
        """What `flax.nnx.view` sets.

        Args:
          use_running_average: normalize with the running statistics (evaluation).
          update_running: whether the state moves.
        """
        set_running_view(self, use_running_average, update_running)

"""Norms that share statistics among iterations, around the layer whose output they normalize."""

from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import floating
from .._norms.cross_iteration_batch_norm import cross_iteration_batch_norm, cross_iteration_batch_norm_state
from .._pipeline.marks import ADDED
from ..typing import Activation, AxisIndexGroups, AxisName, BatchNormState, Mask, Momentum, WindowRule
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
    static,
    with_params,
)


@final
class CrossIterationBatchNorm(nnx.Module):
    """A layer without bias, and :func:`jnorm.cross_iteration_batch_norm` of its output, with its state as variables.

    The layer keeps its kernel. The running "mean" and "var", with `track_count` "count", and what is kept of earlier iterations are
    `nnx.BatchStat`; "scale" and "bias" are `nnx.Param`.

    Args:
      layer_instance: `nnx.Linear` or `nnx.Conv`, with `use_bias=False`.
      use_running_average: normalize with the running statistics (evaluation); what :meth:`train` and :meth:`eval` set. None: to be given
        to the call.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      epsilon: added to the variance.
      dtype: y's; None: what `promote_dtype` gives. Statistics are in at least float32 whatever it is.
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
      update_running: whether the state moves, running statistics and earlier iterations; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: the variance that enters the running one is the biased one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      window: how many iterations share their statistics, the present one among them.
      compensation: the factor of the change of the kernel; 0 takes old statistics as they are.
      rule: "max" takes a variance below 0 for 0; "drop" leaves that iteration out.
      exact_second_moment: keep covariances of the inputs' patches in place of slopes; for small kernels.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jnx.CrossIterationBatchNorm(nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs), window=3, rngs=rngs)
      >>> burn_in, step = 1000, 5
      >>> y = layer(jnp.ones((1, 8, 8, 2)), window_size=jnp.where(step < burn_in, 1, 3))
      >>> layer.counts[...].tolist()
      [64.0, 0.0]
      >>> layer.eval()
      >>> y = layer(jnp.ones((1, 8, 8, 2)))  # with the running statistics
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]
    means: nnx.BatchStat[jax.Array]
    vars: nnx.BatchStat[jax.Array]
    patches: nnx.BatchStat[jax.Array]
    slopes: nnx.BatchStat[jax.Array]  # without exact_second_moment
    covariances: nnx.BatchStat[jax.Array]  # with it
    kernels: nnx.BatchStat[jax.Array]
    counts: nnx.BatchStat[jax.Array]
    index: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array]  # with track_count

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        use_running_average: bool | None = False,
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
        window: int = 4,
        compensation: float | jax.Array = 1.0,
        rule: WindowRule = "max",
        exact_second_moment: bool = False,
    ) -> None:
        with errors_of(self):
            _check_layer(layer_instance)
        self.layer_instance: Any = layer_instance
        kernel = self.layer_instance.kernel[...]
        self.num_features = kernel.shape[-1]
        self.num_groups = getattr(layer_instance, "feature_group_count", 1)
        self.scale = affine_param(use_scale, scale_init, self.num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, self.num_features, param_dtype, rngs, bias_metadata)
        with errors_of(self):
            state = cross_iteration_batch_norm_state(
                kernel.shape,
                window=window,
                num_groups=self.num_groups,
                exact_second_moment=exact_second_moment,
                track_count=track_count,
            )
        set_state(self, state)
        self.use_running_average = use_running_average
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
        self.window = window
        self.compensation = compensation
        self.rule: WindowRule = rule
        self.exact_second_moment = exact_second_moment
        self.state_keys = tuple(state)

    def __call__(
        self,
        inputs: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: Mask | None = None,
        update_running: bool | None = None,
        momentum: Momentum = None,
        window_size: int | jax.Array | None = None,
        compensation: float | jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """The layer's output, normalized.

        Args:
          inputs: the layer's.
          use_running_average: None: the constructor's.
          mask: broadcasts against the layer's output, of which it is the same for all features; nonzero counts.
          update_running: None: the constructor's.
          momentum: a float or a traced scalar; None: the constructor's.
          window_size: how many iterations are used, the present one among them, an int or a traced scalar (clipped to the window); None:
            all there are. 1 is batch normalization, for a burn-in.
          compensation: a float or a traced scalar; None: the constructor's.
          residual: of the output's shape, added before the activation.

        Returns:
          y of the shape of the layer's output.
        """
        layer = self.layer_instance
        given = layer(inputs)
        with errors_of(self):
            x, kernel = floating(given, self.dtype), layer.kernel[...]
            shape = kernel.shape[-1:]
            call = running_arguments(self, BatchNormState, given, x, shape, use_running_average, update_running, momentum)
            call["state"] = {key: getattr(self, key)[...] for key in (*self.state_keys, *ADDED) if hasattr(self, key)}
            y, state = cross_iteration_batch_norm(
                x,
                **call,
                inputs=floating(inputs, None),
                kernel=kernel,
                linear_op=lambda i, w: _plain(layer, w)(i),
                num_groups=self.num_groups,
                window_size=window_size,
                compensation=self.compensation if compensation is None else compensation,
                rule=self.rule,
                running_var_correction=self.running_var_correction,
                mask=mask,
                residual=residual,
            )
            if state is not call["state"]:
                for key, entry in state.items():
                    getattr(self, key).set_value(entry)
            return y

    def set_view(self, use_running_average: bool | None = None, update_running: bool | None = None) -> None:
        """What `flax.nnx.view` sets.

        Args:
          use_running_average: normalize with the running statistics (evaluation).
          update_running: whether the running statistics move.
        """
        set_running_view(self, use_running_average, update_running)


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, nnx.Linear | nnx.Conv):
        raise TypeError(
            f"layer_instance must be an nnx.Linear or an nnx.Conv, got {type(layer).__name__}; jnorm.cross_iteration_batch_norm takes any "
            "function that is linear in its kernel."
        )
    if layer.use_bias:
        raise ValueError("layer_instance has a bias, whose place the bias of the norm takes; make the layer with use_bias=False.")
    if getattr(layer, "mask", None) is not None:
        raise ValueError("layer_instance has a mask of its kernel, with which its outputs see different patches of the inputs.")


def _plain(layer: Any, kernel: jax.Array) -> Any:
    """The layer with another kernel, computing in the dtype of what it is given."""
    changed: Any = with_params(layer, {("kernel",): kernel})
    changed.dtype = None
    return changed

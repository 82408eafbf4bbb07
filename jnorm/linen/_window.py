"""Norms that share statistics among iterations, around the layer whose output they normalize."""

from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import floating
from .._norms.cross_iteration_batch_norm import cross_iteration_batch_norm, cross_iteration_batch_norm_state
from .._pipeline.marks import ADDED
from ..typing import Activation, AxisIndexGroups, AxisName, Mask, Momentum, WindowRule
from ._arguments import running_arguments
from ._variables import Initializer, StateVariables, errors_of, param_of


@final
class CrossIterationBatchNorm(nn.Module):
    """A layer without bias, and :func:`jnorm.cross_iteration_batch_norm` of its output, with its state as variables.

    The layer keeps its kernel where it is, in "params" of `layer_instance`. The collection "batch_stats" holds the running "mean" and
    "var", with `track_count` "count", and what is kept of earlier iterations; "params" holds "scale" and "bias". Initialization updates
    nothing and merges nothing over devices.

    Args:
      layer_instance: `nn.Dense` or `nn.Conv`, with `use_bias=False`.
      use_running_average: normalize with the running statistics (evaluation). Give it here or to the call.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      epsilon: added to the variance.
      dtype: y's; None: what the layer's output, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale and bias.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count; not needed in evaluation.
      axis_index_groups: groups of equal size within that axis.
      update_running: whether the state moves, running statistics and earlier iterations; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: the variance that enters the running one is the biased one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      window: how many iterations share their statistics, the present one among them.
      compensation: the factor of the change of the kernel; 0 takes old statistics as they are.
      rule: "max" takes a variance below 0 for 0; "drop" leaves that iteration out.
      exact_second_moment: keep covariances of the inputs' patches in place of slopes; for small kernels.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> layer = jnn.CrossIterationBatchNorm(nn.Conv(4, (3, 3), use_bias=False), use_running_average=False, window=3)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
      >>> burn_in, step = 1000, 5
      >>> y, updates = layer.apply(
      ...     variables, jnp.ones((1, 8, 8, 2)), window_size=jnp.where(step < burn_in, 1, 3), mutable=["batch_stats"]
      ... )
      >>> updates["batch_stats"]["counts"].tolist()
      [64.0, 0.0]
    """

    layer_instance: nn.Module
    use_running_average: bool | None = None
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
    window: int = 4
    compensation: float | jax.Array = 1.0
    rule: WindowRule = "max"
    exact_second_moment: bool = False

    @nn.compact
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
          use_running_average: as in the constructor; to be given in one of the two.
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
        layer: Any = self.layer_instance
        with errors_of(self):
            _check_layer(layer)
        given = layer(inputs)
        with errors_of(self):
            x, kernel = floating(given, self.dtype), param_of(layer, "kernel")
            groups = getattr(layer, "feature_group_count", 1)

            def make() -> Any:
                return cross_iteration_batch_norm_state(
                    kernel.shape,
                    window=self.window,
                    num_groups=groups,
                    exact_second_moment=self.exact_second_moment,
                    track_count=self.track_count,
                )

            keys = (*jax.eval_shape(make), *(key for key in ADDED if self.has_variable("batch_stats", key)))
            variables = StateVariables(self, make, keys)
            call = running_arguments(self, given, x, variables, use_running_average, update_running, momentum)
            y, state = cross_iteration_batch_norm(
                x,
                **call,
                inputs=floating(inputs, None),
                kernel=kernel,
                linear_op=lambda i, w: _plain(layer, w.shape[-1]).apply({"params": {"kernel": w}}, i),
                num_groups=groups,
                window_size=window_size,
                compensation=self.compensation if compensation is None else compensation,
                rule=self.rule,
                running_var_correction=self.running_var_correction,
                mask=mask,
                residual=residual,
            )
            variables.write(call["state"], state)
            return y


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, nn.Dense | nn.Conv):
        raise TypeError(
            f"layer_instance must be an nn.Dense or an nn.Conv, got {type(layer).__name__}; jnorm.cross_iteration_batch_norm takes any "
            "function that is linear in its kernel."
        )
    if layer.use_bias:
        raise ValueError("layer_instance has a bias, whose place the bias of the norm takes; make the layer with use_bias=False.")
    if getattr(layer, "mask", None) is not None:
        raise ValueError("layer_instance has a mask of its kernel, with which its outputs see different patches of the inputs.")


def _plain(layer: Any, features: int) -> Any:
    """The layer outside of the model, with so many outputs, computing in the dtype of what it is given."""
    return layer.clone(parent=None, name=None, features=features, dtype=None)

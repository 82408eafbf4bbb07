"""Divisive normalization, over fields and over the batch."""

from collections.abc import Sequence
from typing import Any, final

import flax.linen as nn
import jax
import jax.numpy as jnp

from .._modules import distinct_axes, feature_shape, floating, merged_axes, result_dtype
from .._norms.batch_norm import batch_norm_state
from .._norms.divisive_batch_norm import divisive_batch_norm
from .._norms.divisive_norm import divisive_norm
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Border, Mask, Momentum
from ._arguments import running_arguments, running_variables
from ._variables import Initializer, bias_param, errors_of, scale_param


@final
class DivisiveNorm(nn.Module):
    """Divisive normalization: :func:`jnorm.divisive_norm` with its scale and bias, and a smoothing, as parameters.

    What it adds to the loss, the mean magnitude "l1", is sown into the collection "losses", and returned with `return_l1`.

    Args:
      sum_field: for each axis of x the size of a window, or None, the whole axis: what the mean is taken over.
      suppression_field: the same for the mean square; `sum_field` where None.
      sigma: the smoothing, in x's units; where it is learned its start.
      use_learned_sigma: learn it, as the scalar parameter "sigma".
      border: "zero": windows see zeros beyond the ends of an axis, which count. "renorm": nothing.
      feature_axes: the axes along which scale and bias vary.
      axis_name: named axis or axes over which the whole axes of the fields are split; not used in initialization.
      axis_index_groups: groups of equal size within that axis.
      activation: "relu", "leaky_relu", "silu" or "gelu", or any callable, applied after.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale, bias and sigma.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> x = jnp.ones((2, 8, 8, 3))
      >>> layer = jnn.DivisiveNorm(sum_field=(1, 5, 5, None), use_learned_sigma=True)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'bias': (3,), 'scale': (3,), 'sigma': ()}
      >>> y, sown = layer.apply(variables, x, mutable=["losses"])
      >>> penalty = 0.01 * sum(jax.tree.leaves(sown["losses"]))  # for the loss
    """

    sum_field: Sequence[int | None]
    suppression_field: Sequence[int | None] | None = None
    sigma: float = 1.0
    use_learned_sigma: bool = False
    border: Border = "zero"
    feature_axes: Axes = -1
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    activation: Activation | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: Mask | None = None, return_l1: bool = False) -> Any:
        """Normalizes x.

        Args:
          x: floating or integer.
          mask: broadcasts against x; nonzero counts.
          return_l1: return the mean magnitude too.

        Returns:
          y of x's shape, or (y, l1).
        """
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = feature_shape(x, features, "feature_axes")
            scale, bias = scale_param(self, shape), bias_param(self, shape)
            y, l1 = divisive_norm(
                x,
                scale,
                bias,
                sum_field=self.sum_field,
                suppression_field=self.suppression_field,
                sigma=_sigma(self),
                border=self.border,
                feature_axes=features,
                mask=mask,
                **merged_axes(self, not self.is_initializing()),
                activation=self.activation,
                dtype=result_dtype(given, scale, bias, dtype=self.dtype),
            )
            return _result(self, y, l1, return_l1)


@final
class DivisiveBatchNorm(nn.Module):
    """Batch normalization with a smoothing: :func:`jnorm.divisive_batch_norm` with its state as variables.

    The variables are those of :class:`BatchNorm`, and the parameter "sigma" where it is learned. What it adds to the loss, the mean
    magnitude "l1", is sown into the collection "losses", and returned with `return_l1`.

    Args:
      sigma: the smoothing, in x's units; where it is learned its start.
      use_learned_sigma: learn it, as the scalar parameter "sigma".
      use_running_average: normalize with the running statistics (evaluation). Give it here or to the call.
      feature_axes: the axes that keep their own statistics; all others are reduced.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      dtype: y's; None: what x, scale and bias promote to. Statistics are in at least float32 whatever it is.
      param_dtype: of scale, bias and sigma.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes to merge statistics over, by count; not needed in evaluation.
      axis_index_groups: groups of equal size within that axis.
      update_running: whether the running statistics move; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: the variance that enters the running one is the biased one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> layer = jnn.DivisiveBatchNorm(sigma=2.0, momentum=0.5)
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> (y, l1), updates = layer.apply(variables, x, use_running_average=False, return_l1=True, mutable=["batch_stats"])
      >>> float(l1), updates["batch_stats"]["mean"].tolist()
      (1.5, [1.0, 2.0])
    """

    sigma: float = 1.0
    use_learned_sigma: bool = False
    use_running_average: bool | None = None
    feature_axes: Axes = -1
    momentum: Momentum = 0.99
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
        return_l1: bool = False,
    ) -> Any:
        """Normalizes x.

        Args:
          x: floating or integer.
          use_running_average: as in the constructor; to be given in one of the two.
          mask: broadcasts against x; nonzero counts.
          update_running: None: the constructor's.
          momentum: a float or a traced scalar; None: the constructor's.
          residual: of x's shape, added before the activation.
          return_l1: return the mean magnitude too; in evaluation, which merges nothing, that of the device's own part.

        Returns:
          y of x's shape, or (y, l1).
        """
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            variables = running_variables(self, batch_norm_state, BatchNormState, x, feature_shape(x, features, "feature_axes"))
            call = running_arguments(self, given, x, variables, use_running_average, update_running, momentum)
            call |= {"sigma": _sigma(self), "running_var_correction": self.running_var_correction}
            y, state, l1 = divisive_batch_norm(x, **call, feature_axes=features, mask=mask, residual=residual)
            variables.write(call["state"], state)
            return _result(self, y, l1, return_l1)


def _sigma(module: DivisiveNorm | DivisiveBatchNorm) -> float | jax.Array:
    if not module.use_learned_sigma:
        return module.sigma
    return module.param("sigma", nn.initializers.constant(module.sigma), (), module.param_dtype)


def _result(module: nn.Module, y: jax.Array, l1: jax.Array, return_l1: bool) -> Any:
    if not module.is_initializing():  # else `init` would make a variable of it
        module.sow("losses", "l1", l1)
    return (y, l1) if return_l1 else y

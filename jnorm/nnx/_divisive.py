"""Divisive normalization, over fields and over the batch."""

from collections.abc import Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import distinct_axes, floating
from .._norms.batch_norm import batch_norm_state
from .._norms.divisive_batch_norm import divisive_batch_norm
from .._norms.divisive_norm import divisive_norm
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Border, Mask, Momentum
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
    value,
    write_state,
    y_dtype,
)


@final
class DivisiveNorm(nnx.Module):
    """Divisive normalization: :func:`jnorm.divisive_norm` with its scale and bias, and a smoothing, as parameters.

    What it adds to the loss, the mean magnitude, is returned with `return_l1`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      sum_field: for each axis of x the size of a window, or None, the whole axis: what the mean is taken over.
      suppression_field: the same for the mean square; `sum_field` where None.
      sigma: the smoothing, in x's units; where it is learned its start.
      use_learned_sigma: learn it, as the scalar parameter "sigma".
      border: "zero": windows see zeros beyond the ends of an axis, which count. "renorm": nothing.
      feature_axes: the axes along which scale and bias vary.
      axis_name: named axis or axes over which the whole axes of the fields are split.
      axis_index_groups: groups of equal size within that axis.
      activation: "relu", "leaky_relu", "silu" or "gelu", or any callable, applied after.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
      param_dtype: of scale, bias and sigma.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.DivisiveNorm(3, sum_field=(1, 5, 5, None), use_learned_sigma=True, rngs=nnx.Rngs(0))
      >>> y, l1 = layer(jnp.ones((2, 8, 8, 3)), return_l1=True)
      >>> penalty = 0.01 * l1  # for the loss
      >>> y.shape, layer.sigma[...].tolist()
      ((2, 8, 8, 3), 1.0)
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    sigma: Any

    def __init__(
        self,
        num_features: int,
        *,
        sum_field: Sequence[int | None],
        suppression_field: Sequence[int | None] | None = None,
        sigma: float = 1.0,
        use_learned_sigma: bool = False,
        border: Border = "zero",
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        activation: Activation | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        self.sigma = _sigma(sigma, use_learned_sigma, param_dtype)
        self.use_learned_sigma = use_learned_sigma
        self.sum_field = static(sum_field)
        self.suppression_field = static(suppression_field)
        self.border: Border = border
        self.feature_axes = static(feature_axes)
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)
        self.activation = activation
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.promote_dtype = promote_dtype

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
            shape = shape_of_features(self, x, features, "feature_axes")
            scale, bias = value(self.scale, shape), value(self.bias, shape)
            y, l1 = divisive_norm(
                x,
                scale,
                bias,
                sum_field=self.sum_field,
                suppression_field=self.suppression_field,
                sigma=_value_of(self.sigma),
                border=self.border,
                feature_axes=features,
                mask=mask,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                activation=self.activation,
                dtype=y_dtype(self, given, affine=(scale, bias)),
            )
            return (y, l1) if return_l1 else y


@final
class DivisiveBatchNorm(nnx.Module):
    """Batch normalization with a smoothing: :func:`jnorm.divisive_batch_norm` with its state as variables.

    The variables are those of :class:`BatchNorm`, and the parameter "sigma" where it is learned. What it adds to the loss, the mean
    magnitude, is returned with `return_l1`.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      sigma: the smoothing, in x's units; where it is learned its start.
      use_learned_sigma: learn it, as the scalar parameter "sigma".
      use_running_average: normalize with the running statistics (evaluation); what :meth:`train` and :meth:`eval` set. None: to be given
        to the call.
      feature_axes: the axes that keep their own statistics; all others are reduced.
      momentum: the fraction of the old running value that is kept. None: the cumulative average, which needs `track_count`.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
      param_dtype: of scale, bias and sigma.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: named axis or axes to merge statistics over, by count; not needed in evaluation.
      axis_index_groups: groups of equal size within that axis.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes scale and bias.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      update_running: whether the running statistics move; None: exactly when batch statistics normalize.
      track_count: keep a count, for debiased and cumulative averages.
      running_var_correction: the variance that enters the running one is the biased one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.DivisiveBatchNorm(2, sigma=2.0, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y, l1 = layer(jnp.array([[1.0, 2.0], [3.0, 6.0]]), return_l1=True)
      >>> float(l1), layer.mean[...].tolist()
      (1.5, [1.0, 2.0])
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    sigma: Any
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array]  # with track_count

    def __init__(
        self,
        num_features: int,
        *,
        sigma: float = 1.0,
        use_learned_sigma: bool = False,
        use_running_average: bool | None = False,
        feature_axes: Axes = -1,
        momentum: Momentum = 0.99,
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
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        self.sigma = _sigma(sigma, use_learned_sigma, param_dtype)
        set_state(self, batch_norm_state(num_features, track_count=track_count))
        self.use_learned_sigma = use_learned_sigma
        self.use_running_average = use_running_average
        self.feature_axes = static(feature_axes)
        self.momentum = momentum
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
          use_running_average: None: the constructor's.
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
            shape = shape_of_features(self, x, features, "feature_axes")
            call = running_arguments(self, BatchNormState, given, x, shape, use_running_average, update_running, momentum)
            call |= {"sigma": _value_of(self.sigma), "running_var_correction": self.running_var_correction}
            y, state, l1 = divisive_batch_norm(x, **call, feature_axes=features, mask=mask, residual=residual)
            write_state(self, call["state"], state)
            return (y, l1) if return_l1 else y

    def set_view(self, use_running_average: bool | None = None, update_running: bool | None = None) -> None:
        """What `flax.nnx.view` sets.

        Args:
          use_running_average: normalize with the running statistics (evaluation).
          update_running: whether the running statistics move.
        """
        set_running_view(self, use_running_average, update_running)


def _sigma(sigma: float, learned: bool, dtype: Any) -> Any:
    return nnx.Param(jnp.full((), sigma, dtype)) if learned else sigma


def _value_of(sigma: Any) -> Any:
    return sigma[...] if isinstance(sigma, nnx.Variable) else sigma

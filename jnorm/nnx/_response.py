"""Filter response normalization, and the activation that goes with it."""

from typing import Any, final

import jax
import jax.numpy as jnp
from flax import nnx

from .._modules import check_keeps_batch, distinct_axes, floating
from .._norms.filter_response_norm import LEARNED_EPSILON_INIT, filter_response_norm, thresholded_linear_unit
from .._pipeline.values import as_array
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, Mask
from ._variables import (
    NO_METADATA,
    Initializer,
    Metadata,
    PromoteDtype,
    affine_param,
    checked,
    errors_of,
    promote_dtype,
    shape_of_features,
    static,
    value,
    y_dtype,
)


@final
class FilterResponseNorm(nnx.Module):
    """Filter response normalization: :func:`jnorm.filter_response_norm` with its scale and bias, and an epsilon, as parameters.

    It has no activation of its own: :class:`ThresholdedLinearUnit` comes after it.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      use_learned_epsilon: add the size of a learned number, the scalar parameter "learned_epsilon", to the epsilon. For maps of one
        position, and for x of shape (N, C).
      epsilon: added to the mean square.
      dtype: y's; None: what `promote_dtype` gives. Statistics are of x as given, in at least float32, whatever it is.
      param_dtype: of scale, bias and the learned epsilon.
      use_bias: add a bias.
      use_scale: multiply by a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      learned_epsilon_init: initializer of the learned epsilon.
      reduction_axes: the axes that are reduced, none of them a feature axis; None: all but the first and the feature axes.
      feature_axes: the axes along which scale and bias vary, not the first.
      axis_name: named axis or axes over which the reduced axes are split.
      axis_index_groups: groups of equal size within that axis.
      promote_dtype: a function as `flax.nnx.nn.dtypes.promote_dtype`: it fixes y's dtype, never what is reduced.
      rngs: the stream "params" initializes the parameters.
      bias_metadata: metadata of the bias's variable, such as its sharding.
      scale_metadata: metadata of the scale's variable.
      learned_epsilon_metadata: metadata of the learned epsilon's variable.
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.FilterResponseNorm(2, use_learned_epsilon=True, rngs=nnx.Rngs(0))
      >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])  # one sample, two positions, two channels
      >>> print(np.asarray(layer(x)).round(3).ravel(), layer.learned_epsilon.shape)
      [0.447 0.447 1.342 1.342] ()
    """

    scale: nnx.Param[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    learned_epsilon: nnx.Param[jax.Array] | None

    def __init__(
        self,
        num_features: int,
        *,
        use_learned_epsilon: bool = False,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        learned_epsilon_init: Initializer = LEARNED_EPSILON_INIT,
        reduction_axes: Axes | None = None,
        feature_axes: Axes = -1,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
        learned_epsilon_metadata: Metadata = NO_METADATA,
        activation: Activation | None = None,
    ) -> None:
        self.num_features = num_features
        self.scale = affine_param(use_scale, scale_init, num_features, param_dtype, rngs, scale_metadata)
        self.bias = affine_param(use_bias, bias_init, num_features, param_dtype, rngs, bias_metadata)
        self.learned_epsilon = nnx.data(None)
        if use_learned_epsilon:
            self.learned_epsilon = nnx.Param(learned_epsilon_init(checked(rngs).params(), (), param_dtype), **learned_epsilon_metadata)
        self.use_learned_epsilon = use_learned_epsilon
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes = static(reduction_axes)
        self.feature_axes = static(feature_axes)
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)
        self.promote_dtype = promote_dtype
        self.activation = activation

    def __call__(self, x: jax.Array, *, mask: Mask | None = None) -> jax.Array:
        """Normalizes x; `mask` broadcasts against it, and what it counts enters the mean square."""
        with errors_of(self):
            given = as_array(x)
            x = floating(given, self.dtype)
            features = distinct_axes(self.feature_axes, x.ndim)
            check_keeps_batch(self.reduction_axes, features, x.ndim)
            shape = shape_of_features(self, x, features, "feature_axes")
            scale, bias = value(self.scale, shape), value(self.bias, shape)
            return filter_response_norm(
                x,
                scale,
                bias,
                learned_epsilon=value(self.learned_epsilon, ()),
                reduction_axes=distinct_axes(self.reduction_axes, x.ndim),
                feature_axes=features,
                epsilon=self.epsilon,
                mask=mask,
                axis_name=self.axis_name,
                axis_index_groups=self.axis_index_groups,
                activation=self.activation,
                dtype=y_dtype(self, given, affine=(scale, bias)),
            )


@final
class ThresholdedLinearUnit(nnx.Module):
    """The maximum of x and a threshold of each channel: :func:`jnorm.thresholded_linear_unit` with the threshold as a parameter.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      feature_axes: the axes along which the threshold varies.
      param_dtype: of the threshold. y has x's dtype whatever it is.
      threshold_init: initializer of the threshold; with 0 the unit starts as a ReLU.
      rngs: the stream "params" initializes the threshold.
      threshold_metadata: metadata of the threshold's variable, such as its sharding.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jnorm import nnx as jnx
      >>> layer = jnx.ThresholdedLinearUnit(2, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[-1.0, 0.5]])).tolist(), layer.threshold[...].tolist()
      ([[0.0, 0.5]], [0.0, 0.0])
    """

    threshold: nnx.Param[jax.Array]

    def __init__(
        self,
        num_features: int,
        *,
        feature_axes: Axes = -1,
        param_dtype: Any = jnp.float32,
        threshold_init: Initializer = nnx.initializers.zeros,
        rngs: nnx.Rngs,
        threshold_metadata: Metadata = NO_METADATA,
    ) -> None:
        self.num_features = num_features
        self.threshold = affine_param(True, threshold_init, num_features, param_dtype, rngs, threshold_metadata)
        self.feature_axes = static(feature_axes)
        self.param_dtype = param_dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """The maximum of x and the threshold."""
        with errors_of(self):
            x = floating(x, None)
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = shape_of_features(self, x, features, "feature_axes")
            return thresholded_linear_unit(x, self.threshold[...].reshape(shape), feature_axes=features)

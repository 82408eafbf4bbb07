"""Standardization of input features, whose statistics are variables."""

from typing import Any, final

import flax.linen as nn
import jax

from .._modules import distinct_axes, feature_shape, merged_axes, state_keys
from .._norms.feature_standardization import (
    feature_statistics,
    feature_statistics_state,
    standardize_features,
    unstandardize_features,
)
from .._pipeline.arguments import check_flag
from .._pipeline.values import as_array
from ..typing import Axes, AxisIndexGroups, AxisName, FeatureStatistics, Mask
from ._variables import StateVariables, errors_of

KEYS = state_keys(FeatureStatistics)


@final
class FeatureStandardization(nn.Module):
    """Standardizes input features: :func:`jnorm.standardize_features` with statistics of the training data as variables.

    The collection "batch_stats" holds "count", "mean" and "var". They are fitted in a pass over the training data, and then stay.
    Initialization fits nothing.

    Args:
      correction: the variance that x is divided by the root of is the biased one times n / max(n - correction, 1); 1 is the unbiased one.
      minimum_std: the least divisor of a feature that is not constant.
      feature_axes: the axes that have their own statistics.
      dtype: z's; None: x's, float32 for integers.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge the statistics over; used in fitting only.
      axis_index_groups: groups of equal size within that axis.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jnorm import linen as jnn
      >>> layer, data = jnn.FeatureStandardization(), jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]])  # two batches of two examples
      >>> variables = layer.init(jax.random.key(0), data[0])
      >>> for x in data:
      ...     _, variables = layer.apply(variables, x, fit=True, mutable=["batch_stats"])
      >>> variables["batch_stats"]["mean"].tolist(), variables["batch_stats"]["var"].tolist()
      ([3.0], [3.5])
      >>> z = layer.apply(variables, data[0])
      >>> layer.apply(variables, z, method="inverse").round(4).tolist()
      [[1.0], [3.0]]
    """

    correction: int | float = 0
    minimum_std: float = 0.0
    feature_axes: Axes = -1
    dtype: Any = None
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None

    @nn.compact
    def __call__(self, x: jax.Array, fit: bool = False, *, mask: Mask | None = None) -> jax.Array:
        """Standardizes x.

        Args:
          x: floating or integer.
          fit: put x into the statistics before; "batch_stats" must then be mutable.
          mask: broadcasts against x; nonzero counts in the statistics.

        Returns:
          z of x's shape.
        """
        with errors_of(self):
            x = as_array(x)
            features = distinct_axes(self.feature_axes, x.ndim)
            shape = feature_shape(x, features, "feature_axes")
            variables = StateVariables(self, lambda: feature_statistics_state(shape), KEYS)
            state: FeatureStatistics = variables.read()
            if check_flag(fit, "fit") and not self.is_initializing():
                new = feature_statistics(x, state, feature_axes=features, mask=mask, **merged_axes(self, True))
                variables.write(state, new)
                state = new
            return standardize_features(x, state, feature_axes=features, **self._options())

    def inverse(self, z: jax.Array) -> jax.Array:
        """From z to x: `layer.apply(variables, z, method="inverse")`.

        Args:
          z: floating or integer.

        Returns:
          x of z's shape.
        """
        with errors_of(self):
            if not self.has_variable("batch_stats", "mean"):
                raise ValueError('there are no statistics in the collection "batch_stats"; initialize and fit the module first.')
            state: Any = {key: self.get_variable("batch_stats", key) for key in KEYS}
            z = as_array(z, "z")
            return unstandardize_features(z, state, feature_axes=distinct_axes(self.feature_axes, z.ndim), **self._options())

    def _options(self) -> dict[str, Any]:
        return {"correction": self.correction, "minimum_std": self.minimum_std, "dtype": self.dtype}

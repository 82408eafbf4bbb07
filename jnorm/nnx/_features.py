"""Standardization of input features, whose statistics are variables."""

from typing import Any, final

import jax
from flax import nnx

from .._modules import distinct_axes, merged_axes, state_keys
from .._norms.feature_standardization import (
    feature_statistics,
    feature_statistics_state,
    standardize_features,
    unstandardize_features,
)
from .._pipeline.arguments import check_flag
from .._pipeline.values import as_array
from ..typing import Axes, AxisIndexGroups, AxisName, FeatureStatistics, Mask
from ._variables import errors_of, read_state, set_state, shape_of_features, static, write_state

KEYS = state_keys(FeatureStatistics)


@final
class FeatureStandardization(nnx.Module):
    """Standardizes input features: :func:`jnorm.standardize_features` with statistics of the training data as variables.

    "count", "mean" and "var" are `nnx.BatchStat`. They are fitted in a pass over the training data, and then stay.

    Args:
      num_features: the number of features: the product of the sizes of the feature axes.
      correction: the variance that x is divided by the root of is the biased one times n / max(n - correction, 1); 1 is the unbiased one.
      minimum_std: the least divisor of a feature that is not constant.
      feature_axes: the axes that have their own statistics.
      dtype: z's; None: x's, float32 for integers.
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge the statistics over; used in fitting only.
      axis_index_groups: groups of equal size within that axis.
      rngs: accepted, as other modules take them; nothing is random.

    Example:
      >>> import jax.numpy as jnp
      >>> from jnorm import nnx as jnx
      >>> layer, data = jnx.FeatureStandardization(1), jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]])  # two batches of two examples
      >>> for x in data:
      ...     _ = layer(x, fit=True)
      >>> layer.mean[...].tolist(), layer.var[...].tolist()
      ([3.0], [3.5])
      >>> layer.inverse(layer(data[0])).round(4).tolist()
      [[1.0], [3.0]]
    """

    count: nnx.BatchStat[jax.Array]
    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]

    def __init__(
        self,
        num_features: int,
        *,
        correction: int | float = 0,
        minimum_std: float = 0.0,
        feature_axes: Axes = -1,
        dtype: Any = None,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        self.num_features = num_features
        set_state(self, feature_statistics_state(num_features))
        self.correction = correction
        self.minimum_std = minimum_std
        self.feature_axes = static(feature_axes)
        self.dtype = dtype
        self.axis_name = axis_name
        self.axis_index_groups = static(axis_index_groups)

    def __call__(self, x: jax.Array, fit: bool = False, *, mask: Mask | None = None) -> jax.Array:
        """Standardizes x.

        Args:
          x: floating or integer.
          fit: put x into the statistics before.
          mask: broadcasts against x; nonzero counts in the statistics.

        Returns:
          z of x's shape.
        """
        with errors_of(self):
            x = as_array(x)
            features, state = self._read(x)
            if check_flag(fit, "fit"):
                new = feature_statistics(x, state, feature_axes=features, mask=mask, **merged_axes(self, True))
                write_state(self, state, new)
                state = new
            return standardize_features(x, state, feature_axes=features, **self._options())

    def inverse(self, z: jax.Array) -> jax.Array:
        """From z to x.

        Args:
          z: floating or integer.

        Returns:
          x of z's shape.
        """
        with errors_of(self):
            z = as_array(z, "z")
            features, state = self._read(z)
            return unstandardize_features(z, state, feature_axes=features, **self._options())

    def _read(self, x: jax.Array) -> tuple[Any, FeatureStatistics]:
        features = distinct_axes(self.feature_axes, x.ndim)
        return features, read_state(self, KEYS, shape_of_features(self, x, features, "feature_axes"))

    def _options(self) -> dict[str, Any]:
        return {"correction": self.correction, "minimum_std": self.minimum_std, "dtype": self.dtype}

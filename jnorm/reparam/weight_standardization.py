"""Weight standardization, plain and scaled."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from .._pipeline.arguments import Across, check_affine, check_dtype, check_epsilon, check_flag, check_x
from .._pipeline.axes import Layout, canonical_axes, others
from .._pipeline.normalize import affine, run
from .._stats import Stats, inverse_sqrt
from ..typing import Axes

EpsilonMode = Literal["outside", "inside", "max"]


def weight_standardization(
    w: jax.Array,
    scale: jax.Array | None = None,
    *,
    feature_axes: Axes = -1,
    correction: int | float = 1,
    epsilon: float = 1e-5,
    epsilon_mode: EpsilonMode = "outside",
    fan_in: bool = False,
    dtype: Any = None,
) -> jax.Array:
    r"""Weight standardization: each output's weights with mean 0 and standard deviation 1.

    .. math:: \hat W = g\,\frac{W - \mu}{\sigma + \epsilon}

    with mean and variance over all axes but `feature_axes`, for layers that a norm follows.

    Args:
      w: a kernel, floating: `(..., C)`, or outputs on any axes.
      scale: g, the gain, of the shape of the feature axes; 1 where None.
      feature_axes: the axes of the outputs.
      correction: the variance is the sum of squares over max(n - correction, 1): 1 is the unbiased one, 0 the biased.
      epsilon: see `epsilon_mode`.
      epsilon_mode: the divisor: "outside" is σ + ε, "inside" √(σ² + ε), "max" √max(σ², ε).
      fan_in: n·σ² in place of σ², so that the weights of an output have length g, not g·√n: scaled weight standardization.
      dtype: the result's dtype; w's where None.

    Returns:
      The standardized weight, of w's shape; 0 where an output's weights are all equal.

    Raises:
      ValueError: shapes or axes that do not fit; no axis to reduce; an unknown `epsilon_mode`.
      TypeError: w is not floating.

    Numerics:
      The unit of all norms: statistics in at least float32, stable, the mean as two floats. The gradient is finite where all weights are
      equal.

    Distributed:
      Nothing is merged over named axes; under jit a sharded w is reduced over its shards.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> w = jnp.array([[1.0], [2.0], [3.0]])
      >>> jnorm.reparam.weight_standardization(w).ravel().round(3).tolist()
      [-1.0, 0.0, 1.0]

    References:
      Qiao, Wang, Liu, Shen, Yuille, "Weight Standardization", 2019, https://arxiv.org/abs/1903.10520; the defaults are those of the
      authors' PyTorch code. timm's `StdConv2d` is `correction=0, epsilon=1e-6, epsilon_mode="inside"`. The scaled form of Brock, De,
      Smith, 2021, https://arxiv.org/abs/2101.08692, is `correction=0, epsilon=1e-4, epsilon_mode="max", fan_in=True` with a gain.
    """
    w = check_x(w, name="w")
    features = canonical_axes(feature_axes, w.ndim, "feature_axes", of="w")
    layout = Layout(w.shape, others(w.ndim, features), features)
    if not layout.reduced:
        raise ValueError(f"w of shape {w.shape} has no axis to reduce: feature_axes={feature_axes!r} are all of them.")
    if epsilon_mode not in get_args(EpsilonMode):
        raise ValueError(f"epsilon_mode must be one of {get_args(EpsilonMode)}, got {epsilon_mode!r}.")
    gain = check_affine(scale, "scale", layout, w, of="w")
    weight_map = functools.partial(_map, correction, check_epsilon(epsilon), epsilon_mode, check_flag(fan_in, "fan_in"))
    return run(w, weight_map, gain, layout, Across(), dtype=check_dtype(dtype, w))[0]


def _map(correction: float, epsilon: float, mode: EpsilonMode, fan_in: bool, stats: Stats, gain: jax.Array | None) -> tuple:
    var = stats.m2 / jnp.maximum(stats.count - correction, 1)
    if fan_in:
        var = var * stats.count
    match mode:
        case "outside":
            positive = var > 0  # the slope of the root at 0 is infinite
            mul = 1 / (jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1)), 0) + epsilon)
        case "inside":
            mul = inverse_sqrt(var + epsilon)
        case "max":
            mul = inverse_sqrt(jnp.maximum(var, epsilon))
    return stats.offset, *affine(mul, gain)

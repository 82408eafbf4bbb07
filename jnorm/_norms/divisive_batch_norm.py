"""Batch normalization with a smoothing, and the mean magnitude for the loss."""

from typing import Any

import jax
import jax.numpy as jnp

from .._pipeline.batch import Batch
from .._pipeline.running import check_momentum, check_state, moved
from .._stats import Stats, stats_dtype
from ..typing import Activation, Axes, AxisIndexGroups, AxisName, BatchNormState, Mask, Momentum
from .batch_norm import BatchNormAux, batch_norm_map
from .divisive_norm import check_sigma, mean_magnitude


def divisive_batch_norm(
    x: jax.Array,
    state: BatchNormState,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    sigma: float | jax.Array = 1.0,
    use_running_average: bool = False,
    update_running: bool | None = None,
    momentum: Momentum = 0.99,
    feature_axes: Axes = -1,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    running_var_correction: int | float = 0,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, BatchNormState, jax.Array]:
    r"""Batch normalization with a smoothing σ, which may be learned, and the mean magnitude for the loss: the paper's BN*.

    .. math:: y = \text{act}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \text{var}}}\,\gamma + \beta + \text{residual}\right), \qquad
              \ell_1 = \text{mean}\,|x - \mu|

    with the mean μ and the biased variance of the batch, or the running ones: :func:`batch_norm` with ε = σ², which is large here.

    Args:
      x: `(..., C)`, or features on any axes; floating. All axes may be features, one example alone, in evaluation and where
        `axis_name` names the batch.
      state: from :func:`batch_norm_state`, :func:`batch_norm`'s.
      scale: gamma, `(C,)`; 1 where None.
      bias: beta, `(C,)`; 0 where None.
      sigma: the smoothing, in x's units: a scalar, or `(C,)`; may be traced and is differentiated, its sign does not matter.
      use_running_average: normalize with the running statistics (evaluation).
      update_running: whether the state moves; None: exactly when batch statistics normalize.
      momentum: the fraction of the old running value that is kept, a float or a traced scalar (clipped to [0, 1]). None: the cumulative
        average, which needs `state["count"]`.
      feature_axes: the axes that keep their own statistics; all others are reduced.
      mask: broadcasts against x; nonzero counts. What is not counted goes through the same map (a non-finite value as the mean).
      axis_name: named axis or axes of `pmap`, `shard_map` or `vmap` to merge statistics over, by count.
      axis_index_groups: groups of equal size within that axis.
      running_var_correction: the variance that enters the state is the biased one times n / max(n - correction, 1).
      activation: "relu", "leaky_relu", "silu" or "gelu" (fused), or any callable, applied after.
      residual: of x's shape, added before the activation.
      dtype: y's dtype; x's where None.

    Returns:
      y of x's shape; the state: the same keys, shapes and dtypes, and where nothing updates the object that was given; and the mean of
      abs(x - μ) over all that is counted, around the running mean in evaluation, a scalar in at least float32: times a small λ it is
      what the paper adds to the loss. Its derivative at x = μ is 0. Where it is not used it costs nothing under jit.

    Raises:
      ValueError, TypeError: as :func:`batch_norm`; a sigma that is not finite, or of another shape.

    Numerics:
      As :func:`batch_norm`. The state's variance is without σ². Kept for the backward pass: x, and the residual where a named activation
      follows it.

    Distributed:
      As :func:`batch_norm`. Where the third result is used, in training once more as much, and one all-reduce of two numbers each way; it
      is the same on all devices, so that a loss which is averaged over devices has it once.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0]])
      >>> y, state, l1 = jnorm.divisive_batch_norm(x, jnorm.batch_norm_state(1), sigma=2.0, momentum=0.5)
      >>> print(np.asarray(y).ravel().round(3), state["mean"], float(l1))
      [-1.    -0.333  0.333  1.   ] [2.] 2.0

    References:
      Ren, Liao, Urtasun, Sinz, Zemel, "Normalizing the Normalizers: Comparing and Extending Network Normalization Schemes", 2016,
      https://arxiv.org/abs/1611.04520: BN*, whose σ the published configurations (renmengye/div-norm) set to 1 for CIFAR-10.
    """
    batch = Batch.of(
        "divisive_batch_norm", x, state, scale, bias, use_running_average=use_running_average, update_running=update_running,
        feature_axes=feature_axes, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups, activation=activation,
        residual=residual, dtype=dtype, save="input",
    )  # fmt: skip
    check_state(state, batch.layout.feature_shape)
    check_momentum(momentum, state)
    wide = stats_dtype(batch.x.dtype)
    mean, var = (jnp.asarray(state[key]).astype(wide) for key in ("mean", "var"))
    aux = (check_sigma(sigma, batch.layout, batch.x), BatchNormAux(mean, var, batch.scale, batch.bias))
    y, stats = batch.run(_map, aux, mean)
    l1 = mean_magnitude(batch.x, batch.mask, batch.layout, batch.across, mean if batch.evaluates else None)
    if not batch.updates:
        return y, state, l1
    return y, moved(state, stats, momentum, running_var_correction), l1


def _map(stats: Stats, aux: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    sigma, running = aux
    return batch_norm_map(sigma**2, stats, running)

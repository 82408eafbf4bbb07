"""Local response normalization."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._jax_internals import whole_along, with_sharding_of
from .._kernels._forms import counted, read, usable
from .._pipeline.arguments import broadcast_mask, check_dtype, check_flag, check_x
from .._pipeline.axes import canonical_axes
from .._stats import stats_dtype
from ..typing import Axes, Mask


def local_response_norm(
    x: jax.Array,
    *,
    size: int = 5,
    alpha: float | jax.Array = 1e-4,
    beta: float | jax.Array = 0.75,
    k: float | jax.Array = 1.0,
    divide_alpha: bool = True,
    window_axes: Axes = -1,
    mask: Mask | None = None,
    dtype: Any = None,
) -> jax.Array:
    r"""Local response normalization: each element over the squares in a window around it.

    .. math:: y_c = x_c \left(k + \frac{\alpha}{n} \sum_{j=c-\lfloor n/2 \rfloor}^{c+\lfloor (n-1)/2 \rfloor} x_j^2\right)^{-\beta}

    Args:
      x: any shape; floating.
      size: n, the length of the window along each of `window_axes`. The window ends where x does, as if x went on with zeros; it may be
        longer than x.
      alpha: weight of the squares, a scalar of at least 0.
      beta: the exponent, a scalar.
      k: added to the weighted squares, a positive scalar.
      divide_alpha: divide alpha by the number of elements of a window, size to the power of the number of `window_axes`, also where the
        window is cut off; or use it as it stands.
      window_axes: the channel axis, for windows across channels; or the axes of positions, for windows within each channel.
      mask: broadcasts against x; nonzero counts. What is not counted adds no square to a window; it goes through the same map (a
        non-finite value as 0).
      dtype: y's dtype; x's where None.

    Returns:
      y of x's shape.

    Raises:
      ValueError: a size below 1; a negative alpha, a k that is not positive, or anything but a scalar among them; axes out of range; a mask
        that does not broadcast.
      TypeError: x is not floating; a size that is no int.

    Numerics:
      In at least float32; only y is cast. The squares of a window are added up one by one, and squares above 3e38 (x above 1e19) overflow:
      y is 0 there, and the derivative by beta NaN. alpha, beta and k may be traced, and are differentiable; then nothing looks at their
      range, and a sum of k and the squares that is not positive gives what the power gives, in general NaN.
      Kept for the backward pass: x alone; the sums over windows are computed again.

    Distributed:
      No named collective, so that under `shard_map` a window ends at the device's own part of x. Under jit over sharded arrays the window
      reaches over, and the compiler exchanges what it needs; on a mesh of explicit axes x is gathered along the window's axes.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jnorm
      >>> print(np.asarray(jnorm.local_response_norm(jnp.arange(1.0, 7.0), size=3, alpha=0.5, k=2.0)).round(3))
      [0.458 0.666 0.71  0.694 0.662 0.921]

    References:
      Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012,
      https://papers.nips.cc/paper/4824. PyTorch's LocalResponseNorm and Caffe's layer divide alpha by the size, as here, PyTorch for even
      sizes too; their k is 1 by default. TensorFlow's `tf.nn.local_response_normalization` does not divide (`divide_alpha=False`), its
      window is `2·depth_radius + 1`, and its defaults are radius 5, alpha 1 and beta 0.5. Caffe's WITHIN_CHANNEL is `window_axes` of the
      positions, with k = 1. PyTorch's CrossMapLRN2d never takes the first channel out of its sliding sum, and differs.
    """
    x = check_x(x)
    axes, wide = canonical_axes(window_axes, x.ndim, "window_axes"), stats_dtype(x.dtype)
    size, divides = _check_size(size), check_flag(divide_alpha, "divide_alpha")
    scalars = {
        "alpha": _check_scalar(alpha, "alpha", wide, "at least 0", lambda v: v >= 0),
        "beta": _check_scalar(beta, "beta", wide, "finite", np.isfinite),
        "k": _check_scalar(k, "k", wide, "above 0", lambda v: v > 0),
    }
    traced = {name: v for name, v in scalars.items() if isinstance(v, jax.Array)}
    static = {name: v for name, v in scalars.items() if name not in traced}
    divisor = size ** len(axes) if divides else 1
    # Checkpointed, so that x alone is kept, and not the windows' sums and their powers.
    normalized = jax.checkpoint(
        functools.partial(_normalized, axes=axes, size=size, divisor=divisor, dtype=check_dtype(dtype, x), **static)
    )
    return normalized(x, broadcast_mask(mask, x), **traced)


def _check_size(size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(f"size is the length of the window, a static int, got {size!r}.")
    if size < 1:
        raise ValueError(f"size is the length of the window and must be at least 1, got {size}.")
    return int(size)


def _check_scalar(value: Any, name: str, dtype: Any, wanted: str, holds: Any) -> Any:
    """A Python float, or a scalar array, which may be traced."""
    if isinstance(value, int | float | np.number):
        if not holds(float(value)):
            raise ValueError(f"{name} must be {wanted}, got {value}.")
        return float(value)
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be a number or a scalar array, got {value!r}.")
    if jnp.ndim(value) or jnp.iscomplexobj(value):
        raise ValueError(f"{name} must be a real scalar, got {value.dtype} of shape {value.shape}.")
    return jnp.asarray(value).astype(dtype)


def _normalized(
    x: jax.Array, mask: jax.Array | None, *, alpha: Any, beta: Any, k: Any, axes: tuple[int, ...], size: int, divisor: int, dtype: Any
) -> jax.Array:
    there = jax.typeof(x)
    x = whole_along(x, axes)
    mask = None if mask is None else whole_along(mask, axes)
    v = read(usable(x, x, mask))
    base = k + alpha / divisor * _window_sums(counted(v, mask) ** 2, axes, size)
    return with_sharding_of((v * base**-beta).astype(dtype), there)


def _window_sums(v: jax.Array, axes: tuple[int, ...], size: int) -> jax.Array:
    """Axis by axis. As a windowed reduction, whose transpose is one too, with the window mirrored: the transpose of a sum of shifted slices
    is a sum of padded arrays, for each of which the compiler computes all of the expression again."""
    for axis in axes:
        # Beyond the end of x there is nothing to add.
        last = max(v.shape[axis] - 1, 0)
        before, after = min(size // 2, last), min((size - 1) // 2, last)
        window = [before + after + 1 if i == axis else 1 for i in range(v.ndim)]
        padding = [(before, after) if i == axis else (0, 0) for i in range(v.ndim)]
        v = lax.reduce_window(v, np.zeros((), v.dtype), lax.add, window, (1,) * v.ndim, padding)
    return v

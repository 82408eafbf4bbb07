"""Spectral normalization."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._pipeline.arguments import check_dtype, check_epsilon, check_flag, check_x
from .._pipeline.values import check_size
from .._stats import stats_dtype
from ..typing import SpectralNormState
from .weight_norm import l2_normalize


def spectral_norm_state(key: jax.Array, num_features: int, *, dtype: Any = jnp.float32) -> SpectralNormState:
    """The power iteration before its first step: a random vector.

    Args:
      key: a random key.
      num_features: size of the weight's last axis.
      dtype: of both entries.

    Returns:
      `{"u": (1, num_features), standard normal, "sigma": 1}`.

    Raises:
      ValueError: num_features is no int of at least 0.

    Example:
      >>> import jax, jnorm
      >>> state = jnorm.reparam.spectral_norm_state(jax.random.key(0), 4)
      >>> state["u"].shape, state["sigma"].shape
      ((1, 4), ())
    """
    shape = (1, check_size(num_features, "num_features"))
    return SpectralNormState(u=jax.random.normal(key, shape, dtype), sigma=jnp.ones((), dtype))


def spectral_norm(
    w: jax.Array,
    state: SpectralNormState,
    *,
    n_steps: int = 1,
    epsilon: float = 1e-12,
    update_stats: bool = True,
    dtype: Any = None,
) -> tuple[jax.Array, SpectralNormState]:
    r"""Spectral normalization: a weight divided by its largest singular value, which a power iteration estimates.

    .. math:: \bar W = \frac{W}{\sigma}, \qquad \sigma = v\,W\,u^\top

    with W as the matrix `(-1, C)`, and per step v ← u Wᵀ / ‖u Wᵀ‖, u ← v W / ‖v W‖. v and u are constants to the derivative.

    Args:
      w: floating, `(..., C)` with two axes or more.
      state: from :func:`spectral_norm_state`, or from the last call.
      n_steps: steps of the power iteration in this call, at least 1.
      epsilon: added to the squared norms of u and v.
      update_stats: whether the state moves. Where it does not (evaluation), the steps are taken all the same, from the stored u.
      dtype: the result's dtype; w's where None.

    Returns:
      w / sigma of w's shape (w itself where sigma is 0), and the state: the same shapes and dtypes; the object that was given where
      `update_stats` is False. Where sigma is 0, u stays, so that a weight that starts at 0 is normalized once it moves.

    Raises:
      ValueError: w with fewer than two axes; a state of other keys or shapes; `n_steps` below 1.
      TypeError: w is not floating.

    Numerics:
      In at least float32, with products of full precision on every backend. Sigma is at most the largest singular value, and
      approaches it over calls. For a convolution this is the norm of the kernel as a matrix, not of the convolution.

    Distributed:
      Nothing is merged over named axes: a weight that is the same on all devices, with the same state, stays so.

    Example:
      >>> import jax.numpy as jnp, jnorm
      >>> state = {"u": jnp.array([[1.0, 1.0]]), "sigma": jnp.array(1.0)}
      >>> w, state = jnorm.reparam.spectral_norm(jnp.diag(jnp.array([3.0, 1.0])), state)
      >>> print(state["sigma"].round(4))
      2.8636

    References:
      Miyato, Kataoka, Koyama, Yoshida, "Spectral Normalization for Generative Adversarial Networks", 2018,
      https://arxiv.org/abs/1802.05957. The state, its initial values and the matrix are those of Flax's Linen module. Keras's layer
      overwrites the kernel in each training call; here the weight that is trained is never touched.
    """
    w = check_x(w, name="w")
    if w.ndim < 2:
        raise ValueError(f"w must have two axes or more, to be seen as a matrix, got shape {w.shape}.")
    if not isinstance(n_steps, int | np.integer) or n_steps < 1:
        raise ValueError(f"n_steps must be an int of at least 1, got {n_steps!r}.")
    _check_state(state, w.shape[-1])
    wide = stats_dtype(w.dtype)
    matrix = w.astype(wide).reshape(-1, w.shape[-1])
    stored = lax.stop_gradient(jnp.asarray(state["u"])).astype(wide)
    u, v = _power_iteration(lax.stop_gradient(matrix), stored, n_steps, check_epsilon(epsilon))
    sigma = _product(_product(v, matrix), u.T)[0, 0]
    usable = sigma != 0
    # The derivative of a quotient has the divisor's square, which is out of range for huge weights: that of 1 is not.
    constant = lax.stop_gradient(jnp.where(usable, sigma, 1))
    normalized = (w.astype(wide) / constant / jnp.where(usable, sigma / constant, 1)).astype(check_dtype(dtype, w))
    if not check_flag(update_stats, "update_stats"):
        return normalized, state
    new = {"u": jnp.where(usable, u, stored), "sigma": lax.stop_gradient(sigma)}
    return normalized, SpectralNormState(**{k: a.astype(jnp.result_type(state[k])) for k, a in new.items()})


def _check_state(state: Any, features: int) -> None:
    shapes = {"u": (1, features), "sigma": ()}
    got = {k: jnp.shape(v) for k, v in state.items()} if isinstance(state, dict) else type(state).__name__
    if got != shapes:
        raise ValueError(
            f"state must be a dict of shapes {shapes} for a weight of {features} features, got {got}; make it with spectral_norm_state."
        )


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _power_iteration(matrix: jax.Array, u: jax.Array, steps: int, epsilon: float) -> tuple[jax.Array, jax.Array]:
    def unit(a: jax.Array) -> jax.Array:
        return l2_normalize(a, (1,), epsilon=epsilon, dtype=a.dtype)

    v = u
    for _ in range(steps):
        v = unit(_product(u, matrix.T))
        u = unit(_product(v, matrix))
    return u, v

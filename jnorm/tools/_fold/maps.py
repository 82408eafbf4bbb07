"""A norm's evaluation map, multiplied into the kernel and bias of a linear layer before or after it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class EvaluationMap(NamedTuple):
    """y = (x - mean)·mul + add, each of the shape of the features. The mean is apart, so that a bias near it loses no digits."""

    mean: jax.Array
    mul: jax.Array
    add: jax.Array

    @property
    def shift(self) -> jax.Array:
        """What y is for x = 0."""
        return self.add - self.mean * self.mul

    def reshape(self, shape: Sequence[int]) -> "EvaluationMap":
        return EvaluationMap(*(a.reshape(shape) for a in self))


def evaluation_map(state: Mapping[str, Any], scale: Any, bias: Any, epsilon: Any, dtype: Any) -> EvaluationMap:
    """Of a state with "mean", and "var", "std" or neither."""
    mean = jnp.asarray(state["mean"]).astype(dtype)
    real = mean.real.dtype
    if "var" in state:
        mul = 1 / jnp.sqrt(jnp.asarray(state["var"]).astype(real) + jnp.asarray(epsilon, real))
    elif "std" in state:
        mul = 1 / jnp.asarray(state["std"]).astype(real)
    else:
        mul = jnp.ones_like(mean, dtype=real)
    mul = mul.astype(dtype)
    mul = mul if scale is None else mul * jnp.asarray(scale).astype(dtype)
    return EvaluationMap(mean, mul, jnp.zeros_like(mean) if bias is None else jnp.asarray(bias).astype(dtype))


def folding_dtype(*arrays: Any) -> Any:
    """That of all of them, at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(jnp.asarray(a).dtype for a in arrays if a is not None), jnp.float32)


def with_complex(dtype: Any, computed: Any) -> Any:
    """The dtype, complex where what is computed is."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(dtype, jnp.complex64) if jnp.issubdtype(computed, jnp.complexfloating) else dtype


def narrowed(a: jax.Array, dtype: Any) -> jax.Array:
    """In this dtype. Where that is real, and computed together with complex numbers, there is no imaginary part."""
    return (a if jnp.issubdtype(dtype, jnp.complexfloating) else a.real).astype(dtype)


def along(v: jax.Array, ndim: int, axes: Sequence[int]) -> jax.Array:
    """v, whose axes are these of an array of `ndim` axes in any order, as one that broadcasts against it."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    shape = [1] * ndim
    for i in order:
        shape[axes[i]] = v.shape[i]
    return v.transpose(order).reshape(shape)


def into_previous(kernel: jax.Array, bias: jax.Array | None, norm: EvaluationMap, axes: Sequence[int], bias_axes: Sequence[int]) -> Any:
    """The layer before. Without a bias one of the shape of the map appears.

    Args:
      kernel: of the dtype that is computed in, as all else.
      bias: or None.
      norm: of all features in one or more axes.
      axes: of the kernel, in the order of the features.
      bias_axes: of the bias, likewise.
    """
    norm = norm.reshape([kernel.shape[a] for a in axes])
    new = kernel * along(norm.mul, kernel.ndim, axes)
    if bias is None:
        return new, norm.shift
    mean, mul, add = (along(v.reshape([bias.shape[a] for a in bias_axes]), bias.ndim, bias_axes) for v in norm)
    return new, (bias - mean) * mul + add


def into_next(kernel: jax.Array, norm: EvaluationMap, axes: Sequence[int], kept: Sequence[int], groups: int = 1) -> Any:
    """The layer after, and what is to be added to its bias, of the shape of the kernel's kept axes.

    Args:
      kernel: of the dtype that is computed in, as all else.
      norm: of all features.
      axes: of the kernel, along which its inputs lie, in the order of the features.
      kept: the axes that the output has, in its order; the others are summed over.
      groups: of a convolution with one input axis and one that is kept, whose inputs are this many times the kernel's.
    """
    if groups == 1:
        mul, shift = (along(v.reshape([kernel.shape[a] for a in axes]), kernel.ndim, axes) for v in (norm.mul, norm.shift))
    else:
        (inputs,), (outputs,) = axes, kept
        each = kernel.shape[outputs] // groups
        by_output = [jnp.repeat(v.reshape(groups, kernel.shape[inputs]), each, axis=0) for v in (norm.mul, norm.shift)]
        mul, shift = (along(v, kernel.ndim, (outputs, inputs)) for v in by_output)
    summed = tuple(a for a in range(kernel.ndim) if a not in kept)
    left = sorted(kept)
    added = jnp.sum(kernel * shift, axis=summed)
    return kernel * mul, added.transpose([left.index(a) for a in kept])


def plus(bias: jax.Array, added: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The bias with what is added along these axes of it."""
    return bias + along(added.reshape([bias.shape[a] for a in axes]), bias.ndim, axes)

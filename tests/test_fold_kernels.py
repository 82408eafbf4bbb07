"""Evaluation maps in the kernels of layers before and after them: every kind of layer, bias and dtype, against formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import jnorm
import oracles
from jnorm import tools
from pairwise import checkerboard
from refusals import refuses

EPSILON = 0.3  # far from where it could be forgotten


def conv(x, kernel, dims=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding="VALID", **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dims, **options)


def circular(x, kernel):
    return conv(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap"), kernel)


def transposed(x, kernel, **options):
    return lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def einsum(equation):
    return functools.partial(jnp.einsum, equation)


IMAGE = (2, 5, 6, 4)
# name: (layer, x, kernel, the axes of the features: of the kernel, of the output)
BEFORE = {
    "dense": (einsum("bi,io->bo"), (3, 4), (4, 6), -1, -1),
    "conv": (functools.partial(conv, padding="SAME"), IMAGE, (3, 3, 4, 6), -1, -1),
    "strided": (functools.partial(conv, strides=(2, 1), padding="SAME"), IMAGE, (3, 2, 4, 6), -1, -1),
    "dilated": (functools.partial(conv, rhs_dilation=(2, 1), padding="SAME"), IMAGE, (3, 3, 4, 6), -1, -1),
    "grouped": (functools.partial(conv, feature_group_count=2), IMAGE, (3, 3, 2, 6), -1, -1),
    "depthwise": (functools.partial(conv, feature_group_count=4, padding="SAME"), IMAGE, (3, 3, 1, 8), -1, -1),
    "transposed": (transposed, IMAGE, (3, 3, 4, 6), -1, -1),
    "transposed kernel": (functools.partial(transposed, transpose_kernel=True), IMAGE, (3, 3, 6, 4), -2, -1),
    "channels first": (functools.partial(conv, dims=("NCHW", "OIHW", "NCHW")), (2, 4, 5, 6), (6, 4, 3, 3), 0, 1),
    "heads": (einsum("bsi,ihk->bshk"), (2, 3, 4), (4, 2, 3), (-2, -1), (-2, -1)),
    "last of heads": (einsum("bsi,ihk->bshk"), (2, 3, 4), (4, 2, 3), -1, -1),
    "first of heads": (einsum("bsi,ihk->bshk"), (2, 3, 4), (4, 2, 3), 1, 2),
    "batched": (einsum("gbi,gio->gbo"), (2, 3, 4), (2, 4, 5), -1, -1),
}
# The same, of the input in place of the output; then the kernel's axes that stay, and groups.
AFTER = {
    "dense": (einsum("bi,io->bo"), (3, 4), (4, 6), -2, -1, -1, 1),
    "conv": (conv, IMAGE, (3, 3, 4, 6), -2, -1, -1, 1),
    "strided": (functools.partial(conv, strides=(2, 1)), IMAGE, (3, 2, 4, 6), -2, -1, -1, 1),
    "dilated": (functools.partial(conv, rhs_dilation=(2, 1)), IMAGE, (2, 3, 4, 6), -2, -1, -1, 1),
    "grouped": (functools.partial(conv, feature_group_count=2), IMAGE, (3, 3, 2, 6), -2, -1, -1, 2),
    "depthwise": (functools.partial(conv, feature_group_count=4), IMAGE, (3, 3, 1, 8), -2, -1, -1, 4),
    "circular": (circular, IMAGE, (3, 3, 4, 6), -2, -1, -1, 1),
    "channels first": (functools.partial(conv, dims=("NCHW", "OIHW", "NCHW")), (2, 4, 5, 6), (6, 4, 3, 3), 1, 1, 0, 1),
    "heads": (einsum("bshk,hko->bso"), (2, 3, 2, 3), (2, 3, 4), (0, 1), (-2, -1), -1, 1),
    "last of heads": (einsum("bshk,hko->bso"), (2, 3, 2, 3), (2, 3, 4), 1, -1, -1, 1),
    "two outputs": (einsum("bi,iho->bho"), (3, 4), (4, 2, 5), 0, -1, (1, 2), 1),
}


def sizes(shape, axes):
    return tuple(shape[a] for a in np.atleast_1d(axes))


def view(a, axes, ndim):
    """Of the shape of the features, as it broadcasts against an array of this rank."""
    shape = [1] * ndim
    for size, axis in zip(np.shape(a), np.sort(np.atleast_1d(axes) % ndim), strict=True):
        shape[axis] = size
    return np.reshape(a, shape)


def draw(rng, features, dtype=np.float64):
    """A state, a scale and a bias. Means are not near 0, so that a shift that is forgotten is seen."""
    mean, var = rng.normal(size=features) + 2, rng.uniform(0.2, 3, features)
    scale, bias = rng.normal(size=features), rng.normal(size=features)
    return {"mean": mean.astype(dtype), "var": var.astype(dtype)}, scale.astype(dtype), bias.astype(dtype)


def evaluated(x, state, scale, bias, axes):
    mean, var, scale, bias = (view(oracles.wide(a), axes, x.ndim) for a in (state["mean"], state["var"], scale, bias))
    return (x - mean) / np.sqrt(var + EPSILON) * scale + bias


def close(got, want, length, size):
    """In float64 both ways."""
    oracles.assert_close(got, oracles.Bounded(want, size), 4 * length, statistics="float64")


@pytest.mark.parametrize("kind, with_bias", checkerboard(BEFORE, (False, True)))
def test_into_the_layer_before(kind, with_bias, rng, x64):
    layer, x, shape, axes, out_axes = BEFORE[kind]
    x, kernel = rng.normal(size=x), rng.normal(size=shape)
    features = sizes(shape, axes)
    state, scale, norm_bias = draw(rng, features)
    bias = rng.normal(size=features) if with_bias else None
    t = np.asarray(layer(x, kernel))
    t = t if bias is None else t + view(bias, out_axes, t.ndim)
    want = evaluated(t, state, scale, norm_bias, out_axes)
    new, new_bias = tools.fold_into_previous(kernel, bias, state, scale, norm_bias, epsilon=EPSILON, output_axes=axes)
    assert new.shape == shape and new.dtype == np.float64 and new_bias.shape == features
    got = np.asarray(layer(x, new)) + view(new_bias, out_axes, t.ndim)
    size = np.asarray(layer(abs(x), abs(new))) + view(abs(new_bias) + abs(norm_bias), out_axes, t.ndim) + abs(want)
    close(got, want, kernel.size, size)


@pytest.mark.parametrize("kind, with_bias", checkerboard(AFTER, (False, True)))
def test_into_the_layer_after(kind, with_bias, rng, x64):
    layer, x, shape, axes, in_axes, kept, groups = AFTER[kind]
    x, kernel = rng.normal(size=x), rng.normal(size=shape)
    state, scale, norm_bias = draw(rng, sizes(x.shape, in_axes))
    bias = rng.normal(size=sizes(shape, kept)) if with_bias else None
    normalized = evaluated(x, state, scale, norm_bias, in_axes)
    want = np.asarray(layer(normalized, kernel))
    out_axes = 1 if kind == "channels first" else tuple(range(-len(sizes(shape, kept)), 0))
    want = want if bias is None else want + view(bias, out_axes, want.ndim)
    new, new_bias = tools.fold_into_next(
        kernel, bias, state, scale, norm_bias, epsilon=EPSILON, input_axes=axes, output_axes=kept, groups=groups
    )
    assert new.shape == shape and new_bias.shape == sizes(shape, kept)
    got = np.asarray(layer(x, new)) + view(new_bias, out_axes, want.ndim)
    size = np.asarray(layer(abs(x) + abs(normalized) + 10, abs(kernel) + abs(new))) + abs(want)
    close(got, want, kernel.size, size)


@pytest.mark.parametrize("direction", ["before", "after"])
@pytest.mark.parametrize("bias_dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32 bias", "bfloat16 bias"])
@pytest.mark.parametrize("kernel_dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_one_rounding(direction, kernel_dtype, bias_dtype, rng):
    """Of kernel and bias, each of its own dtype, whatever is computed."""
    kernel = rng.normal(size=(4, 6)).astype(kernel_dtype)
    features, axis = (6, -1) if direction == "before" else (4, -2)
    bias = rng.normal(size=6).astype(bias_dtype)
    state, scale, norm_bias = draw(rng, features, np.float32)
    mul = oracles.wide(scale) / np.sqrt(oracles.wide(state["var"]) + EPSILON)
    wide, shift = oracles.wide(kernel), oracles.wide(norm_bias) - oracles.wide(state["mean"]) * mul
    moved = oracles.wide(state["mean"])
    if direction == "before":
        want_bias, size = (oracles.wide(bias) - moved) * mul + norm_bias, (abs(oracles.wide(bias)) + abs(moved)) * abs(mul) + abs(norm_bias)
        fold = tools.fold_into_previous
    else:
        want_bias = oracles.wide(bias) + shift @ wide
        size, fold = abs(oracles.wide(bias)) + (abs(moved * mul) + abs(norm_bias)) @ abs(wide), tools.fold_into_next
    new, new_bias = jax.jit(functools.partial(fold, epsilon=EPSILON))(kernel, bias, state, scale, norm_bias)
    want = wide * view(mul, axis, 2)
    assert (new.dtype, new_bias.dtype) == (kernel_dtype, bias_dtype)
    oracles.assert_close(new, oracles.Bounded(want, abs(want)), 1, what="kernel")
    oracles.assert_close(new_bias, oracles.Bounded(want_bias, size), 4, what="bias")


def test_a_bias_that_appears_has_the_kernels_dtype(rng):
    state, scale, norm_bias = draw(rng, 3, np.float32)
    kernel = rng.normal(size=(3, 3)).astype(ml_dtypes.bfloat16)
    for fold in (tools.fold_into_previous, tools.fold_into_next):
        new, bias = fold(kernel, None, state, scale, norm_bias)
        assert new.dtype == bias.dtype == jnp.bfloat16 and np.abs(np.asarray(bias, np.float32)).min() > 0


def test_a_bias_near_the_mean_loses_nothing():
    """b - μ comes before the product: as b·m - μ·m the difference would be gone."""
    state = {"mean": np.float32([1e4]), "var": np.float32([1e-4])}
    _, bias = tools.fold_into_previous(np.ones((1, 1), np.float32), np.float32([1e4 + 1]), state, epsilon=0.0)
    np.testing.assert_allclose(bias, [100.0], rtol=1e-6)


def test_other_states(rng, x64):
    """Of batch renormalization, whose std has epsilon in it, and of mean-only normalization."""
    kernel, bias = rng.normal(size=(4, 3)), rng.normal(size=3)
    state, scale, norm_bias = draw(rng, 3)
    std = {"mean": state["mean"], "std": np.sqrt(state["var"] + EPSILON)}
    options = {"epsilon": EPSILON}
    wanted = tools.fold_into_previous(kernel, bias, state, scale, norm_bias, **options)
    for got, want in zip(tools.fold_into_previous(kernel, bias, std, scale, norm_bias, **options), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    same, moved = tools.fold_into_previous(kernel, bias, {"mean": state["mean"]}, None, norm_bias, **options)
    np.testing.assert_array_equal(same, kernel)
    np.testing.assert_allclose(moved, bias - state["mean"] + norm_bias, rtol=1e-12)


def test_against_the_norm_itself(rng):
    """The function's evaluation, by jnorm's own way to it."""
    state, scale, norm_bias = draw(rng, 6, np.float32)
    x, kernel = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    y, _ = jnorm.batch_norm(x @ kernel, state, scale, norm_bias, use_running_average=True, epsilon=EPSILON)
    new, bias = tools.fold_into_previous(kernel, None, state, scale, norm_bias, epsilon=EPSILON)
    size = abs(x) @ abs(np.asarray(new)) + abs(np.asarray(bias)) + abs(norm_bias)
    oracles.assert_close(x @ np.asarray(new) + np.asarray(bias), oracles.Bounded(oracles.wide(y), size), 4)


STATE = {"mean": np.zeros(6), "var": np.ones(6)}
KERNEL = np.ones((3, 3, 4, 6))
BAD = {
    "features before": (lambda: tools.fold_into_previous(np.ones((6, 4)), None, STATE), ["(4,)", "output_axes", "(6,)"]),
    "features after": (lambda: tools.fold_into_next(KERNEL, None, STATE), ["(4,)", "input_axes", "(6,)"]),
    "groups": (lambda: tools.fold_into_next(KERNEL, None, STATE, groups=4), ["6 outputs", "groups=4"]),
    "features of groups": (lambda: tools.fold_into_next(KERNEL, None, STATE, groups=2), ["(8,)", "groups=2", "(6,)"]),
    "axes of groups": (lambda: tools.fold_into_next(KERNEL, None, STATE, input_axes=(0, 2), groups=2), ["groups=2", "(0, 2)"]),
    "bias before": (lambda: tools.fold_into_previous(KERNEL, np.ones(4), STATE), ["bias", "(4,)", "(3, 3, 4, 6)"]),
    "bias after": (lambda: tools.fold_into_next(np.ones((6, 3)), np.ones(2), STATE), ["bias", "(3,)", "(2,)"]),
    "scale": (lambda: tools.fold_into_previous(KERNEL, None, STATE, np.ones(5)), ["scale", "(6,)", "(5,)"]),
    "norm bias": (lambda: tools.fold_into_next(np.ones((6, 3)), None, STATE, None, np.ones(())), ["norm_bias", "(6,)", "()"]),
    "no state": (lambda: tools.fold_into_previous(KERNEL, None, {"var": np.ones(6)}), ["state", "mean"]),
    "axes of no bias": (lambda: tools.fold_into_previous(KERNEL, None, STATE, bias_axes=0), ["bias_axes=0", "no bias"]),
    "no groups": (lambda: tools.fold_into_next(np.ones((6, 3)), None, STATE, groups=0), ["groups", "at least 1", "0"]),
    "groups below zero": (lambda: tools.fold_into_next(np.ones((6, 3)), None, STATE, groups=-1), ["groups", "-1"]),
    "one axis for both": (
        lambda: tools.fold_into_next(np.ones((6, 6)), None, STATE, input_axes=1),
        ["input_axes=1", "output_axes=-1", "[1]"],
    ),
    "epsilon": (lambda: tools.fold_into_previous(KERNEL, None, STATE, epsilon=-5.0), ["epsilon", "-5.0"]),
    "an axis that is not there": (lambda: tools.fold_into_previous(KERNEL, None, STATE, output_axes=4), ["output_axes", "4"]),
}


@pytest.mark.parametrize("call, fragments", BAD.values(), ids=BAD)
def test_refusals(call, fragments):
    with refuses(*fragments):
        call()


COMPLEX = np.ones(6, np.complex64)
BAD_DTYPES = {
    "kernel before": (lambda: tools.fold_into_previous(np.ones((3, 6), np.int32), None, STATE), ["kernel must be floating", "int32"]),
    "bias before": (lambda: tools.fold_into_previous(KERNEL, [0] * 6, STATE), ["bias must be floating", "int32"]),
    "kernel after": (lambda: tools.fold_into_next(np.ones((6, 3), np.int8), None, STATE), ["kernel must be floating", "int8"]),
    "bias after": (lambda: tools.fold_into_next(np.ones((6, 2)), [0, 0], STATE), ["bias must be floating", "int32"]),
    "complex scale": (lambda: tools.fold_into_previous(KERNEL, None, STATE, COMPLEX), ["complex scale", "kernel is real"]),
    "complex map": (lambda: tools.fold_into_previous(KERNEL, np.ones(6), {**STATE, "mean": COMPLEX}), ["complex", "bias is real"]),
    "complex kernel": (lambda: tools.fold_into_next(np.ones((6, 2), np.complex64), np.ones(2), STATE), ["complex64", "bias is real"]),
    "epsilon": (lambda: tools.fold_into_next(np.ones((6, 3)), None, STATE, epsilon=None), ["epsilon", "None"]),
}


@pytest.mark.parametrize("call, fragments", BAD_DTYPES.values(), ids=BAD_DTYPES)
def test_refusals_of_dtypes(call, fragments):
    with refuses(*fragments, kind=TypeError):
        call()


def test_a_new_bias_is_complex_where_the_norm_is(rng):
    state, _, _ = draw(rng, 3, np.float32)
    kernel, shift = rng.normal(size=(3, 3)).astype(np.float32), rng.normal(size=3).astype(np.complex64) * (1 + 2j)
    mul = 1 / np.sqrt(oracles.wide(state["var"]) + EPSILON)
    want = shift - oracles.wide(state["mean"]) * mul
    for fold, want_bias in ((tools.fold_into_previous, want), (tools.fold_into_next, want @ oracles.wide(kernel))):
        new, bias = fold(kernel, None, state, None, shift, epsilon=EPSILON)
        assert (new.dtype, bias.dtype) == (np.float32, np.complex64)
        np.testing.assert_allclose(bias, want_bias, rtol=0, atol=1e-5)

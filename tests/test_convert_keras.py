"""Keras's norms: outputs in training and evaluation and moving statistics are Keras's own, there and back, for several steps."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from flax import nnx

from jnorm.tools import convert
from refusals import refuses

os.environ.setdefault("KERAS_BACKEND", "jax")
keras = pytest.importorskip("keras", reason="Keras is an optional test dependency")
if keras.backend.backend() != "jax":
    pytest.skip("Keras was started with another backend", allow_module_level=True)

SHAPE = (4, 5, 3, 6)
ATOL = 60 * 10 * 2**-24  # sums of at most 60 numbers of order ten in float32
CASES = {
    "BatchNormalization": ("BatchNormalization", {}),
    "BatchNormalization-plain": ("BatchNormalization", {"momentum": 0.5, "epsilon": 1e-2, "center": False, "scale": False}),
    "BatchNormalization-axis": ("BatchNormalization", {"axis": 1, "momentum": 0.9, "center": False}),
    "LayerNormalization": ("LayerNormalization", {}),
    "LayerNormalization-axes": ("LayerNormalization", {"axis": [1, -1], "center": False}),
    "LayerNormalization-axis": ("LayerNormalization", {"axis": 2, "scale": False, "epsilon": 1e-5}),
    "GroupNormalization": ("GroupNormalization", {"groups": 3}),
    "GroupNormalization-instance": ("GroupNormalization", {"groups": -1, "center": False}),
    "GroupNormalization-axis": ("GroupNormalization", {"groups": 5, "axis": 1, "scale": False}),
    "RMSNormalization": ("RMSNormalization", {}),
    "RMSNormalization-axes": ("RMSNormalization", {"axis": [2, 3], "epsilon": 1e-2}),
}
call = nnx.jit(lambda module, x: module(x))


def values(variable):
    """Not by Keras's own numpy(), of which NumPy 2 warns."""
    return np.asarray(variable.value)


def batches(rng, number=3):
    return [(rng.normal(size=SHAPE) * (i + 1) + i).astype(np.float32) for i in range(number)]


def made(case, rng, steps=2):
    kind, options = CASES[case]
    layer = getattr(keras.layers, kind)(**options)
    layer.build((None, *SHAPE[1:]))
    for variable in layer.trainable_variables:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    for x in batches(rng, steps) if kind == "BatchNormalization" else ():
        run(layer, x, True)
    return layer


def run(layer, x, training):
    """Keras relies on JAX's promotion of dtypes and of ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return np.asarray(layer(x, training=training) if isinstance(layer, keras.layers.BatchNormalization) else layer(x))


# Others than the first of their kind, which compile as long.
SLOW = {"BatchNormalization-plain", "LayerNormalization-axis", "GroupNormalization-axis", "RMSNormalization-axes"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES])
def test_there_and_back(case, rng):
    layer = made(case, rng)
    norm = convert.of_keras(layer)
    back = convert.as_keras(norm, ndim=4)
    assert [w.name for w in back.weights] == [w.name for w in layer.weights]
    for one, two in zip(back.weights, layer.weights, strict=True):
        # Of axes of both signs Keras has them in another order, but lays out what is in them as if it had not.
        np.testing.assert_array_equal(values(one).ravel(), values(two).ravel(), one.name)
    module = norm.to_nnx()
    for x in batches(rng):
        if norm.runs:
            module.eval()
            want = run(layer, x, False)
            np.testing.assert_allclose(call(module, x), want, rtol=0, atol=ATOL)
            np.testing.assert_allclose(run(back, x, False), want, rtol=0, atol=ATOL)
            module.train()
        want = run(layer, x, True)
        np.testing.assert_allclose(call(module, x), want, rtol=0, atol=ATOL)
        np.testing.assert_allclose(run(back, x, True), want, rtol=0, atol=ATOL)
        for name, theirs in (("mean", "moving_mean"), ("var", "moving_variance")) if norm.runs else ():
            there = values(getattr(layer, theirs))
            bound = ATOL * max(1, abs(there).max())
            np.testing.assert_allclose(getattr(module, name)[...], there, rtol=0, atol=bound, err_msg=name)
            np.testing.assert_allclose(values(getattr(back, theirs)), there, rtol=0, atol=bound, err_msg=name)


def test_the_moving_variance_is_biased(rng):
    layer = keras.layers.BatchNormalization(momentum=0.0)
    x = batches(rng)[0]
    run(layer, x, True)
    np.testing.assert_allclose(values(layer.moving_variance), x.astype(np.float64).var((0, 1, 2)), rtol=1e-5)


def test_of_jnorm(rng):
    """An instance norm is a group norm there; an average whose count has come to its limit is as one without a count."""
    x = batches(rng)[0]
    norm = convert.Norm(kind="InstanceNorm", shape=(6,), scale=np.full(6, 2, np.float32))
    np.testing.assert_allclose(run(convert.as_keras(norm), x, True), call(norm.to_nnx(), x), rtol=0, atol=ATOL)
    kept = {"mean": np.ones(6, np.float32), "var": np.full(6, 2, np.float32)}
    norm = convert.Norm(kind="BatchNorm", shape=(6,), momentum=0.9, count=10.0, epsilon=1e-5, **kept)
    layer, module = convert.as_keras(norm), norm.to_nnx()
    np.testing.assert_allclose(run(layer, x, True), call(module, x), rtol=0, atol=ATOL)
    np.testing.assert_allclose(values(layer.moving_variance), module.var[...], rtol=0, atol=ATOL)


def test_dtypes(rng):
    layer = keras.layers.LayerNormalization(dtype="bfloat16")
    layer.build((None, 6))
    norm = convert.of_keras(layer)
    assert norm.scale.dtype == norm.bias.dtype == "bfloat16" and norm.to_nnx().scale.dtype == "bfloat16"


def test_refusals(rng):
    with refuses("Dense"):
        convert.of_keras(keras.layers.Dense(3))
    with refuses("'norm' (BatchNormalization) is not built"):
        convert.of_keras(keras.layers.BatchNormalization(name="norm"))
    layer = keras.layers.BatchNormalization(renorm=True)
    layer.build((None, 6))
    with refuses("renorm=True"):
        convert.of_keras(layer)
    layer = keras.layers.RMSNormalization(axis=1)
    layer.build((None, 5, 6))
    with refuses("axis=(1,)", "the last axes"):
        convert.of_keras(layer)
    norm = convert.of_keras(made("BatchNormalization", rng))
    for change, told in (
        ({"running_var_correction": 1}, "running_var_correction=0"),
        ({"momentum": None, "count": 3.0}, "cumulative"),
        ({"count": 1.5}, "debiased"),
        ({"activation": "relu"}, "no activation"),
        ({"kind": "TrackedInstanceNorm"}, "TrackedInstanceNorm"),
        ({"kind": "RMSNorm", "bias": None, "scale": None}, "has a scale"),
        ({"kind": "LayerNorm", "feature_axes": (1,), "reduction_axes": (-1,)}, "scale along the axes that it reduces"),
    ):
        with refuses(told):
            convert.as_keras(dataclasses.replace(norm, **change))

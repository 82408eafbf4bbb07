"""Convolutions of Keras and Equinox: those that go over x as the model's do load and give the same, all others are refused.

All values are whole numbers so small that each sum is exact in float32, in any order: outputs are equal, or something else was computed.
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.nnx as jnx
from jnorm.tools import convert
from refusals import refuses

os.environ.setdefault("KERAS_BACKEND", "jax")
LINE, PLANE, VOLUME = (2, 9, 4), (2, 7, 8, 4), (2, 5, 4, 3, 4)  # of odd and even sizes
ONE, NONE = [(1, 1), (1, 1)], [(0, 0), (0, 0)]


@pytest.fixture
def keras():
    return pytest.importorskip("keras", reason="Keras is an optional test dependency")


@pytest.fixture
def eqx():
    return pytest.importorskip("equinox", reason="Equinox is an optional test dependency")


@pytest.fixture(autouse=True)
def _as_they_are():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def whole(rng, shape):
    return rng.integers(-8, 9, size=shape).astype(np.float32)


def of_keras(keras, kind, rng=None, shape=PLANE, **options):
    layer = getattr(keras.layers, kind)(**options, name="conv")
    layer.build(shape)
    for variable in layer.weights if rng is not None else ():
        variable.assign(whole(rng, variable.shape))
    return layer


def of_equinox(eqx, features, size, rng=None, shape=PLANE, **options):
    layer = eqx.nn.Conv(len(shape) - 2, shape[-1], features, size, key=jax.random.key(0), **options)
    return layer if rng is None else jax.tree.map(lambda a: jnp.asarray(whole(rng, a.shape)) if eqx.is_array(a) else a, layer)


def both(weights, features, size, options, shape=PLANE):
    """-> what is computed with a convolution that was loaded: with one of NNX, and with one of Linen."""
    x = jnp.zeros(shape)
    plain = nnx.eval_shape(lambda: nnx.Dict({"conv": nnx.Conv(shape[-1], features, size, **options, rngs=nnx.Rngs(0))}))
    linen = nn.Sequential([nn.Conv(features, size, **options)])
    shapes = jax.eval_shape(linen.init, jax.random.key(0), x)
    return (
        lambda: convert.load(plain, weights)["conv"],
        lambda: linen.bind(convert.load_linen(linen, shapes, weights, x, rename={"layers_0": "conv"})),
    )


def check(want, x, weights, features, size, options):
    for load in both(weights, features, size, options, x.shape):
        np.testing.assert_array_equal(load()(x), want)


# --- What goes over x alike ---------------------------------------------------------------------------------------------------------------

# The layer there, the features, the size of the kernel and the options here, x.
KERAS = {
    "valid": (
        "Conv2D",
        {"filters": 6, "kernel_size": (3, 2), "dilation_rate": (2, 1)},
        6,
        (3, 2),
        {"padding": 0, "kernel_dilation": (2, 1)},
    ),
    "same-groups": (
        "Conv2D",
        {"filters": 6, "kernel_size": (3, 2), "padding": "same", "dilation_rate": 2, "groups": 2},
        6,
        (3, 2),
        {"padding": [(2, 2), (1, 1)], "kernel_dilation": 2, "feature_group_count": 2},
    ),
    "same-strides": ("Conv2D", {"filters": 6, "kernel_size": 3, "padding": "same", "strides": 2}, 6, (3, 3), {"strides": 2}),
    "depthwise": (
        "DepthwiseConv2D",
        {"kernel_size": 3, "depth_multiplier": 2, "padding": "same", "strides": 2},
        8,
        (3, 3),
        {"strides": (2, 2), "feature_group_count": 4},
    ),
    "pointwise-strides": (
        "Conv2D",
        {"filters": 3, "kernel_size": 1, "padding": "same", "strides": 2},
        3,
        (1, 1),
        {"strides": 2, "padding": 0},
    ),
    "causal": (
        "Conv1D",
        {"filters": 6, "kernel_size": 3, "padding": "causal", "dilation_rate": 2},
        6,
        3,
        {"padding": "CAUSAL", "kernel_dilation": 2},
        LINE,
    ),
    "causal-strides": (
        "Conv1D",
        {"filters": 6, "kernel_size": 3, "padding": "causal", "strides": 2},
        6,
        (3,),
        {"padding": [(2, 0)], "strides": 2},
        LINE,
    ),
    "volume": ("Conv3D", {"filters": 2, "kernel_size": (3, 2, 1), "padding": "same"}, 2, (3, 2, 1), {}, VOLUME),
}


@pytest.mark.parametrize("name", KERAS)
def test_keras(keras, rng, name):
    kind, options, features, size, ours, *shape = KERAS[name]
    x = whole(rng, *(shape or [PLANE]))
    layer = of_keras(keras, kind, rng, x.shape, **options)
    check(np.asarray(layer(x)), x, convert.weights_of_keras(layer), features, size, ours)


def test_keras_with_channels_first(keras, rng):
    x = whole(rng, PLANE)
    first = np.moveaxis(x, -1, 1)
    options = {"filters": 6, "kernel_size": (3, 2), "padding": "same", "strides": (2, 1), "data_format": "channels_first"}
    layer = of_keras(keras, "Conv2D", rng, first.shape, **options)
    want = np.moveaxis(np.asarray(layer(first)), 1, -1)
    check(want, x, convert.weights_of_keras(layer), 6, (3, 2), {"strides": (2, 1)})


EQUINOX = {
    "pairs": (
        {"stride": 2, "padding": ((1, 2), (0, 1)), "dilation": (1, 2)},
        (3, 3),
        {"strides": 2, "padding": [(1, 2), (0, 1)], "kernel_dilation": (1, 2)},
    ),
    "groups": ({"padding": (0, 1), "groups": 2}, (3, 2), {"padding": [0, 1], "feature_group_count": 2}),
    "valid": ({"padding": "VALID"}, (3, 2), {"padding": "VALID"}),
    "same": ({"padding": "SAME"}, (3, 2), {"padding": [(1, 1), (0, 1)]}),
    "same-strides": ({"padding": "SAME", "stride": 2}, (3, 2), {"strides": 2}),
    "same-lower": ({"padding": "SAME_LOWER"}, (3, 2), {"padding": [(1, 1), (1, 0)]}),
    "same-lower-strides": ({"padding": "SAME_LOWER", "stride": 2}, (3, 2), {"strides": 2, "padding": "SAME_LOWER"}),
    "circular": ({"padding": 1, "stride": 2, "padding_mode": "CIRCULAR"}, (3, 3), {"strides": 2, "padding": "CIRCULAR"}),
    "circular-same": ({"padding": "SAME", "padding_mode": "CIRCULAR"}, (3, 2), {"padding": "CIRCULAR"}),
    "reflect": ({"padding": 2, "dilation": 2, "padding_mode": "REFLECT"}, (3, 3), {"kernel_dilation": 2, "padding": "REFLECT"}),
    "nothing-to-reflect": ({"padding_mode": "REFLECT"}, (3, 3), {"padding": "VALID"}),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox(eqx, rng, name):
    options, size, ours = EQUINOX[name]
    x = whole(rng, PLANE)
    layer = of_equinox(eqx, 6, size, rng, **options)
    want = np.moveaxis(np.asarray(jax.vmap(layer)(np.moveaxis(x, -1, 1))), 1, -1)
    check(want, x, convert.weights_of_equinox({"conv": layer}), 6, size, ours)


def test_a_causal_one_of_equinox(eqx, rng):
    x = whole(rng, LINE)
    layer = of_equinox(eqx, 6, 3, rng, LINE, padding=((2, 0),))
    want = np.moveaxis(np.asarray(jax.vmap(layer)(np.moveaxis(x, -1, 1))), 1, -1)
    check(want, x, convert.weights_of_equinox({"conv": layer}), 6, 3, {"padding": "CAUSAL"})


# --- What does not ------------------------------------------------------------------------------------------------------------------------


def refused(weights, options, told, shape=PLANE, size=(3, 3)):
    for load, name in zip(both(weights, 4, size, options, shape), ("conv", "layers_0"), strict=True):
        with refuses(f"{name}: {told}", "weights.without_options()"):
            load()
    for load in both(weights.without_options(), 4, size, options, shape):
        load()


KERAS_OTHERWISE = {
    "strides": ({"strides": 2, "padding": "same"}, {}, "strides is (1, 1) here, (2, 2) there"),
    "dilation": ({"dilation_rate": (1, 2)}, {"padding": 0}, "dilation is (1, 1) here, (1, 2) there"),
    "input-dilation": ({}, {"padding": 0, "input_dilation": 2}, "input_dilation is (2, 2) here, (1, 1) there"),
    "valid": ({}, {}, f"padding={ONE} here, padding={NONE} there"),
    "same": ({"padding": "same"}, {"padding": "VALID"}, f"padding={NONE} here, padding={ONE} there"),
    "circular": ({"padding": "same"}, {"padding": "CIRCULAR"}, "the padding is circular here, zeros there"),
    "same-strides": (
        {"padding": "same", "strides": 2},
        {"padding": 1, "strides": 2},
        f'padding={ONE} here, padding="SAME" there, where the name with strides (2, 2) depends on the size of x',
    ),
    "valid-strides": (
        {"strides": 2},
        {"strides": 2},
        f'padding="SAME" here, padding={NONE} there, where the name with strides (2, 2) depends on the size of x',
    ),
}


@pytest.mark.parametrize("name", KERAS_OTHERWISE)
def test_keras_otherwise(keras, name):
    theirs, ours, told = KERAS_OTHERWISE[name]
    refused(convert.weights_of_keras(of_keras(keras, "Conv2D", filters=4, kernel_size=3, **theirs)), ours, told)


def test_keras_causal_otherwise(keras):
    weights = convert.weights_of_keras(of_keras(keras, "Conv1D", shape=LINE, filters=4, kernel_size=3, padding="causal"))
    refused(weights, {}, "padding=[(1, 1)] here, padding=[(2, 0)] there", LINE, 3)


def test_keras_depthwise_otherwise(keras):
    """The same kernel, for x of two channels here."""
    weights = convert.weights_of_keras(of_keras(keras, "DepthwiseConv2D", kernel_size=3, padding="same"))
    refused(weights, {"feature_group_count": 2}, "groups is 2 here, 4 there", (2, 5, 5, 2))


EQUINOX_OTHERWISE = {
    "strides": ({"stride": (1, 2)}, {"padding": 0}, "strides is (1, 1) here, (1, 2) there"),
    "dilation": ({"dilation": 2}, {"padding": 0}, "dilation is (1, 1) here, (2, 2) there"),
    "padding": ({"padding": ((1, 0), (0, 1))}, {}, f"padding={ONE} here, padding=[(1, 0), (0, 1)] there"),
    "same-lower-strides": ({"padding": "SAME_LOWER", "stride": 2}, {"strides": 2}, 'padding="SAME" here, padding="SAME_LOWER" there'),
    "zeros": ({"padding": 1}, {"padding": "REFLECT"}, "the padding is reflect here, zeros there"),
    "replicate": ({"padding": 1, "padding_mode": "REPLICATE"}, {}, "the padding is zeros here, replicate there"),
    "circular": (
        {"padding": 2, "padding_mode": "CIRCULAR"},
        {"padding": "CIRCULAR"},
        f"padding={ONE} here, padding=[(2, 2), (2, 2)] there",
    ),
}


@pytest.mark.parametrize("name", EQUINOX_OTHERWISE)
def test_equinox_otherwise(eqx, name):
    theirs, ours, told = EQUINOX_OTHERWISE[name]
    refused(convert.weights_of_equinox({"conv": of_equinox(eqx, 4, 3, **theirs)}), ours, told)


def test_all_that_is_otherwise_is_told_at_once(eqx):
    weights = convert.weights_of_equinox({"conv": of_equinox(eqx, 4, 3, stride=2, padding_mode="REFLECT", padding=1)})
    with refuses("conv: strides is (1, 1) here, (2, 2) there", "conv: the padding is zeros here, reflect there"):
        both(weights, 4, (3, 3), {})[0]()


def test_kernels_of_other_sizes(eqx):
    """The shapes say so."""
    weights = convert.weights_of_equinox({"conv": of_equinox(eqx, 4, 5, stride=2)})
    with refuses("'conv.kernel' has the shape (5, 5, 4, 4), the model needs (3, 3, 4, 4)"):
        both(weights, 4, (3, 3), {})[0]()


def test_convolutions_in_wrappers(keras, eqx):
    told = f"conv: padding={ONE} here, padding={NONE} there"
    wrapped = keras.layers.SpectralNormalization(keras.layers.Conv2D(4, 3), name="conv")
    wrapped.build(PLANE)
    here = nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0))
    with refuses(told):
        convert.load(nnx.Dict({"conv": here}), convert.weights_of_keras(wrapped))
    weights = convert.weights_of_equinox({"conv": eqx.nn.WeightNorm(of_equinox(eqx, 4, 3))})
    with refuses(told):
        convert.load(nnx.Dict({"conv": jnx.WeightNorm(here, rngs=nnx.Rngs(0))}), weights)


def test_transposed_convolutions_of_keras(keras):
    """Their kernel is of the same shape, and laid out otherwise: it is no convolution's, whatever is left away."""
    weights = convert.weights_of_keras(of_keras(keras, "Conv2DTranspose", filters=4, kernel_size=3))
    for load in both(weights.without_options(), 4, (3, 3), {}):
        with refuses("Missing: 'conv.kernel'", "Not in the model: 'conv.transposed_kernel'"):
            load()


def test_haiku_says_nothing(rng):
    weights = convert.weights_of_haiku({"conv": {"w": whole(rng, (3, 3, 4, 4)), "b": whole(rng, 4)}})
    for load in both(weights, 4, (3, 3), {"strides": 2, "padding": "CIRCULAR"}):
        load()

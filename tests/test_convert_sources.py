"""Sources of Keras, Haiku and Equinox: norms of several axes, names that meet, layers that there is no rule for; and refusals."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
from jnorm import tools
from jnorm.tools import convert
from refusals import refuses

os.environ.setdefault("KERAS_BACKEND", "jax")
AXES = (1, 2, 3)


@pytest.fixture
def eqx():
    return pytest.importorskip("equinox", reason="Equinox is an optional test dependency")


@pytest.fixture(autouse=True)
def _as_they_are():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def rngs():
    return nnx.Rngs(0)


def test_norm_of_several_axes(eqx, rng):
    """Channels come first there and last here, and say so."""
    source = eqx.nn.LayerNorm((3, 4, 5))
    scale = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    weights = convert.weights_of_equinox({"n": eqx.tree_at(lambda m: m.weight, source, jnp.asarray(scale))})
    want = scale.transpose(1, 2, 0)
    linen, x = jnn.LayerNorm(reduction_axes=AXES, feature_axes=AXES), jnp.ones((2, 4, 5, 3))
    shapes = jax.eval_shape(linen.init, jax.random.key(0), x)
    options = {"rename": {"^$": "n"}}
    # A Linen model's only layer has the path "".
    got = convert.load_linen(linen, shapes, weights.without_options(), x, **options, flattened={"": (3, 4, 5)})
    np.testing.assert_array_equal(got["params"]["scale"], want)
    with refuses("has the shape (3, 4, 5), the model needs (4, 5, 3)"):
        convert.load_linen(linen, shapes, weights.without_options(), x, **options)
    model = nnx.Dict({"n": jnx.LayerNorm(60, reduction_axes=AXES, feature_axes=AXES, rngs=rngs())})
    got = convert.load(model, weights, flattened={"n": (3, 4, 5)})
    np.testing.assert_array_equal(got["n"].scale[...], want.ravel())
    np.testing.assert_array_equal(convert.load(model, weights, flattened={"n": (60,)})["n"].scale[...], scale.ravel())
    with refuses("has the shape (3, 4, 5), the model needs (60,)"):
        convert.load(model, weights)
    with refuses("flattened has (3, 4)", "60 features"):
        convert.load(model, weights, flattened={"n": (3, 4)})
    batch = {"n": {"scale": scale.ravel(), "offset": scale.ravel()}}  # after a flattening
    got = convert.load(model, convert.weights_of_haiku(batch), flattened={"n": (3, 4, 5)})
    np.testing.assert_array_equal(got["n"].bias[...], want.ravel())
    with refuses("flattened has 'n' (Embed)"):
        convert.load(nnx.Dict({"n": nnx.Embed(2, 3, rngs=rngs())}), weights, flattened={"n": (3, 1)})


def test_names_that_meet():
    one, two = {"w": np.zeros((2, 2))}, {"w": np.ones((2, 2))}
    with refuses("two layers of the source", "'net.linear.kernel'"):
        convert.weights_of_haiku({"net/~/linear": one, "net/linear": two})
    both = convert.weights_of_haiku({"net/~enc/linear": one, "net/~/linear": two})
    assert set(both.values) == {
        "net.enc.linear.kernel",
        "net.linear.kernel",
    }


def test_weights_beside_inner_layers():
    keras = pytest.importorskip("keras", reason="Keras is an optional test dependency")

    class Mine(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.dense, self.again = (keras.layers.Dense(2, name="dense"),) * 2
            self.drop = keras.layers.Dropout(0.1)

        def build(self, shape):
            self.dense.build(shape)
            self.token = self.add_weight(name="token", shape=(3,))

    block = Mine(name="block")
    block.build((1, 4))
    assert set(convert.weights_of_keras(block).values) == {"dense.kernel", "dense.bias", "token"}
    outer = keras.Sequential([keras.Input((4,)), block])
    assert set(convert.weights_of_keras(outer).values) == {"block.dense.kernel", "block.dense.bias", "block.token"}


def test_heads_are_compared(eqx):
    source = {"a": eqx.nn.MultiheadAttention(4, 8, key=jax.random.key(0))}
    weights = convert.weights_of_equinox(source)
    model = nnx.Dict({"a": nnx.eval_shape(lambda: nnx.MultiHeadAttention(2, 8, use_bias=False, decode=False, rngs=rngs()))})
    with refuses("a: 2 heads here, 4 there"):
        convert.load(model, weights)
    with refuses("the model itself: 2 heads here, 4 there"):
        convert.load(model["a"], weights, rename={"^": "a/"})
    convert.load(model, weights.without_options())


def test_names_of_sequential(eqx):
    """An NNX model of the same structure needs no names."""
    source = eqx.nn.Sequential([eqx.nn.Linear(3, 4, key=jax.random.key(0)), eqx.nn.LayerNorm(4)])
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs()), jnx.LayerNorm(4, rngs=rngs()))
    got = convert.load(model, convert.weights_of_equinox(source))
    np.testing.assert_array_equal(got.layers[0].kernel[...], source.layers[0].weight.T)


def test_transposed_convolutions_are_refused():
    """Kernels of the same shape that are laid out otherwise, when there are as many channels on both sides."""
    model = nnx.Dict({"c": nnx.ConvTranspose(3, 3, (3, 3), rngs=rngs()), "d": nnx.Linear(2, 2, rngs=rngs())})
    params = {"c": {"w": np.ones((3, 3, 3, 3)), "b": np.ones(3)}, "d": {"w": np.ones((2, 2)), "b": np.ones(2)}}
    with refuses("transposed convolutions of other libraries: c", "layers="):
        convert.load(model, convert.weights_of_haiku(params))
    assert convert.load(model, convert.weights_of_haiku(params), layers="d")["d"].kernel[0, 0] == 1


def test_frozen_models():
    """The marks are of jnorm alone, and stay."""
    params, options = {"n": {"scale": np.full(3, 2.0), "offset": np.ones(3)}}, {"rename": {"^$": "n"}}
    state = {f"n/~/{what}_ema": {"hidden": np.zeros(3), "average": np.zeros(3), "counter": np.int32(0)} for what in ("mean", "var")}
    weights = convert.weights_of_haiku(params, state)
    model = tools.freeze(nnx.Dict({"n": jnx.BatchNorm(3, track_count=True, rngs=rngs())}))
    got = convert.load(model, weights)["n"]
    assert got.scale[0] == 2 and hasattr(got, "frozen_statistics")
    linen, x = jnn.BatchNorm(use_running_average=True, track_count=True), jnp.ones((2, 3))
    variables = tools.freeze(linen.init(jax.random.key(0), x))
    got = convert.load_linen(linen, variables, weights, x, **options)
    assert got["params"]["scale"][0] == 2 and "frozen_statistics" in got["batch_stats"]


def test_order_of_a_part_and_names_of_two():
    params = {name: {"w": np.full((2, 2), i), "b": np.ones(2)} for i, name in enumerate(("one", "two", "head"))}
    weights = convert.weights_of_haiku(params)
    model = nnx.Dict({"a": nnx.Linear(2, 2, rngs=rngs()), "b": nnx.Linear(2, 2, rngs=rngs())})
    got = convert.load(model, weights, match="order", ignore=["head.*"])
    assert (got["a"].kernel[0, 0], got["b"].kernel[0, 0]) == (0, 1)
    with refuses("a and b are both called 'one.kernel' there"):
        convert.load(model, weights, rename=lambda path: "one")

"""Sources of Keras, Haiku and Equinox: norms of several axes, names that meet, layers that there is no rule for; and refusals."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
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

"""An NNX model of Flax's classes, live or as Orbax restores it, becomes one of jnorm's with the same output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.nnx as jnx
from jnorm import tools
from jnorm.tools import convert
from refusals import refuses


def net(classes, seed=0):
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(
        classes.WeightNorm(nnx.Linear(3, 4, rngs=rngs), scale_init=nnx.initializers.constant(2.0), rngs=rngs),
        classes.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), update_stats=False, rngs=rngs),
        classes.BatchNorm(4, use_running_average=True, rngs=rngs),
        nnx.Dropout(0.5, deterministic=True, rngs=rngs),
    )


def restored(state):
    """As Orbax does without a target: every key is a text, and a variable a dict of its value."""
    if isinstance(state, nnx.Variable):
        return {"value": state.get_value()}
    return {str(key): restored(value) for key, value in state.items()} if hasattr(state, "items") else state


@pytest.mark.parametrize("form", ["model", "state", "restored", "orbax"])
def test_the_same_output(form, rng, tmp_path):
    theirs = net(nnx)
    theirs.layers[2].mean.set_value(jnp.asarray(rng.normal(size=4), jnp.float32))
    if form == "orbax":
        checkpoint = pytest.importorskip("orbax.checkpoint")
        with checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "checkpoint", nnx.state(theirs, nnx.Not(nnx.RngState)))
        with checkpoint.StandardCheckpointer() as checkpointer:
            source = checkpointer.restore(tmp_path / "checkpoint")
    else:
        state = nnx.state(theirs)
        source = {"model": theirs, "state": state, "restored": restored(state)}[form]
    given = net(jnx, seed=1)
    before = jax.tree.map(np.asarray, nnx.state(given, nnx.Param))
    ours = convert.load_flax(given, source)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(given, nnx.Param)))
    assert isinstance(ours.layers[0].scales[("kernel",)], nnx.Param)
    x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    # Three layers of sums of four numbers.
    np.testing.assert_allclose(ours(x), theirs(x), rtol=0, atol=3 * 16 * 2**-24)


def test_what_does_not_fit():
    state = restored(nnx.state(net(nnx), nnx.Not(nnx.RngState)))
    state["layers"]["2"]["gamma"] = state["layers"]["2"].pop("scale")
    state["layers"]["0"]["layer_instance"]["bias"] = {"value": np.zeros(5)}
    with refuses(
        "Missing: 'layers/2/scale'",
        "Not in the model: 'layers/2/gamma'",
        "layers/0/layer_instance/bias has the shape (5,), the model needs (4,)",
    ):
        convert.load_flax(net(jnx), state)
    with refuses("the variables of Linen's classes are the same here", kind=TypeError):
        convert.load_flax({}, state)


def test_a_live_model_gives_its_hyperparameters():
    """A checkpoint has none: the model stays as it was built."""

    def make(classes, **options):
        return nnx.List([classes.BatchNorm(4, rngs=nnx.Rngs(0), **options), classes.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))])

    theirs = make(nnx, epsilon=1e-2, momentum=0.8)
    got = convert.load_flax(tools.freeze(make(jnx)), theirs)
    assert (got[0].epsilon, got[0].momentum) == (1e-2, 0.8) and hasattr(got[0], "frozen_statistics")
    assert convert.load_flax(make(jnx), nnx.state(theirs))[0].momentum == 0.99
    theirs[1].num_groups = 4
    with refuses("1: num_groups is 2 here, 4 there", "nnx.state(source)"):
        convert.load_flax(make(jnx), theirs)


def test_other_sources():
    model = nnx.Dict({"a": nnx.Linear(2, 2, rngs=nnx.Rngs(0))})
    with refuses("the path 'ckpt/'", "restore it", kind=TypeError):
        convert.load_flax(model, "ckpt/")
    with refuses("Linen's variables", kind=TypeError):
        convert.load_flax(model, {"params": {"a": {"kernel": np.ones((2, 2))}}})
    with refuses("PyTorch module", "weights_of_keras", "got Linear", kind=TypeError):
        convert.load(model, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with refuses("'a' is not as in Haiku's trees", kind=TypeError):
        convert.weights_of_haiku({"a": {"b": {"w": np.ones(2)}}})
    with refuses("'a' is not as in Haiku's trees", kind=TypeError):
        convert.weights_of_haiku({"a": np.ones(2)})

"""Models that differ in one import: a network trained with Flax's norms goes on with jnorm's, from its checkpoint, and the other way.

In float64, where only the definition of the norms could make losses differ.
"""

import functools
import itertools
import logging

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from flax_grid import MODULES, jit, lenient
from models import CLASSES, NNXResNet, NNXTransformer, ResNet, Transformer

KINDS = ["resnet", "transformer"]
STEPS = 5
# About 20 norms one after another, each with sums of up to 512 terms, in 10 steps; Flax's variance cancels about 10 times.
TOLERANCE = 20 * 512 * 10 * 10 * 2**-52


@pytest.fixture(autouse=True)
def _float64(x64):
    yield


def data(kind):
    rng = np.random.default_rng(0)
    shape = (8, 8, 8, 3) if kind == "resnet" else (8, 5, 8)
    return rng.normal(size=shape) + 0.5, rng.integers(CLASSES, size=shape[0])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- Linen ------------------------------------------------------------------------------------------------------------------


def optimizer_of(kind):
    return optax.sgd(0.05, momentum=0.9) if kind == "resnet" else optax.adam(1e-2)


def linen(kind, norms):
    """-> init() -> state; step(state) -> state, loss; evaluate(state) -> loss."""
    model, tx = {"resnet": ResNet, "transformer": Transformer}[kind](norms, jnp.float64), optimizer_of(kind)
    x, labels = data(kind)

    def init():
        variables = model.init(jax.random.key(0), x, train=True)
        return {"variables": variables, "optimizer": tx.init(variables["params"])}

    def step(state):
        def loss_of(params):
            variables = {**state["variables"], "params": params}
            logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return cross_entropy(logits, labels), updates

        params = state["variables"]["params"]
        (loss, updates), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        changes, optimizer = tx.update(gradients, state["optimizer"], params)
        variables = {**state["variables"], **updates, "params": optax.apply_updates(params, changes)}
        return {"variables": variables, "optimizer": optimizer}, loss

    def evaluate(state):
        return cross_entropy(model.apply(state["variables"], x, train=False), labels)

    return init, step, evaluate


# --- NNX --------------------------------------------------------------------------------------------------------------------


def nnx_model(kind, norms):
    """As `linen`; the state is that of model and optimizer."""
    x, labels = data(kind)

    def make():
        model = {"resnet": NNXResNet, "transformer": NNXTransformer}[kind](norms, nnx.Rngs(0), jnp.float64)
        return {"model": model, "optimizer": nnx.Optimizer(model, optimizer_of(kind), wrt=nnx.Param)}

    def init():
        return nnx.state(make())

    def merged(state):
        return nnx.merge(nnx.graphdef(nnx.eval_shape(make)), state)

    def step(state):
        both = merged(state)
        model = both["model"]
        loss, gradients = nnx.value_and_grad(lambda model: cross_entropy(model(x), labels))(model)
        both["optimizer"].update(model, gradients)
        return nnx.state(both), loss

    def evaluate(state):
        model = merged(state)["model"]
        model.eval()
        return cross_entropy(model(x), labels)

    return init, step, evaluate


# --- checkpoints ------------------------------------------------------------------------------------------------------------


def by_orbax(state, like, path):
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports each of its steps
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path / "checkpoint", args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
        return checkpointer.restore(path / "checkpoint", args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state


def by_bytes(state, like, path):
    (path / "checkpoint").write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(like, (path / "checkpoint").read_bytes())


def by_pure_dict(state, like, path):
    """NNX's State, as nested dicts of arrays."""
    (path / "checkpoint").write_bytes(flax.serialization.to_bytes(nnx.to_pure_dict(state)))
    target = nnx.to_pure_dict(like)
    nnx.replace_by_pure_dict(like, flax.serialization.from_bytes(target, (path / "checkpoint").read_bytes()))
    return like


CHECKPOINTS = {"linen": {"orbax": by_orbax, "bytes": by_bytes}, "nnx": {"orbax": by_orbax, "bytes": by_pure_dict}}


@functools.cache
def compiled(api, kind, ours):
    """-> init, step, evaluate, each compiled once for all tests."""
    return tuple(_lenient(jit(f)) for f in functions_of(api, kind, ours))


def functions_of(api, kind, ours):
    return (linen if api == "linen" else nnx_model)(kind, MODULES[api][ours])


def shapes(api, kind, ours):
    """A state without values, as a checkpoint is read into."""
    return jax.eval_shape(_lenient(functions_of(api, kind, ours)[0]))


def _lenient(f):
    """Flax's attention and optax rely on implicit promotion."""

    def run(*args):
        with lenient():
            return f(*args)

    return run


@functools.cache
def trained(api, kind, ours):
    """From Flax's initial variables, which are also ours."""
    step, state = compiled(api, kind, ours)[1], compiled(api, kind, False)[0]()
    for _ in range(STEPS):
        state, _ = step(state)
    return state


@functools.cache
def continued(api, kind, ours):
    """Without a checkpoint."""
    return losses(api, kind, ours, trained(api, kind, ours))


def losses(api, kind, ours, state):
    """Of some more steps, and of evaluation after them."""
    _, step, evaluate = compiled(api, kind, ours)
    found = []
    for _ in range(STEPS):
        state, loss = step(state)
        found.append(float(loss))
    return found, float(evaluate(state))


PAIRS = [pytest.param(api, kind, marks=pytest.mark.slow) for api in CHECKPOINTS for kind in KINDS]


@pytest.mark.parametrize(("api", "kind"), PAIRS)
def test_training_continues(api, kind, tmp_path):
    """In one test, so that each program is compiled once: from Flax to jnorm and back, through orbax and through bytes."""
    for into_ours, checkpoint in itertools.product((True, False), CHECKPOINTS[api]):
        directory = tmp_path / f"{into_ours} {checkpoint}"
        directory.mkdir()
        state = trained(api, kind, not into_ours)
        loaded = CHECKPOINTS[api][checkpoint](state, shapes(api, kind, into_ours), directory)
        assert jax.tree.structure(loaded) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, loaded, state)
        assert jax.tree.map(lambda a: a.dtype, loaded) == jax.tree.map(lambda a: a.dtype, state)
        (want, want_evaluated), (got, evaluated) = continued(api, kind, not into_ours), losses(api, kind, into_ours, loaded)
        difference = max(abs(a - b) for a, b in zip(want, got, strict=True))
        print(f"{api} {kind}: losses {got}, largest difference {difference:.3g}, evaluated {abs(evaluated - want_evaluated):.3g}")
        assert want[-1] < want[0], "the steps train"
        assert difference <= TOLERANCE
        # NNX's running statistics are float32 in both: those of ten steps may be rounded the other way, and each of 20 norms uses them.
        assert abs(evaluated - want_evaluated) <= (TOLERANCE if api == "linen" else 20 * 10 * 2**-23)


@pytest.mark.slow
@pytest.mark.parametrize(("api", "kind"), PAIRS)
def test_untrained_models_are_the_same(api, kind):
    theirs, ours = (compiled(api, kind, o)[0]() for o in (False, True))
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)

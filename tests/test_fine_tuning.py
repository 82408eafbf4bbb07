"""A ResNet-18 whose first norms are frozen, trained on: what is frozen does not move by a bit, and all else does."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
import models
from jnorm import tools

X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 1])
# By the order of calls, and by attribute: the stem and the first stage.
FIRST = {"linen": ["BatchNorm_[0-4]"], "nnx": ["norm", "blocks/[01]"]}
OF_FIRST = {"linen": "(params|batch_stats)/BatchNorm_[0-4]/", "nnx": "(norm|blocks/[01]/norm[12])/"}


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def optimizer(mask):
    """Weight decay would move what has no gradient."""
    trains = optax.adamw(1e-2, weight_decay=0.1, mask=tools.weight_decay_mask)
    return optax.multi_transform({False: trains, True: optax.set_to_zero()}, mask)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def by_linen():
    model = models.ResNet(jnn)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), X, train=True))
    variables = tools.freeze(models.with_values(shapes, np.random.default_rng(1)), FIRST["linen"])
    tx = optimizer(tools.frozen_param_mask(variables["params"], FIRST["linen"]))

    def loss(params, batch_stats):
        logits, updates = model.apply({"params": params, "batch_stats": batch_stats}, X, train=True, mutable=["batch_stats"])
        return loss_of(logits), updates["batch_stats"]

    @jax.jit
    def step(variables, opt_state):
        gradients, batch_stats = jax.grad(loss, has_aux=True)(variables["params"], variables["batch_stats"])
        updates, opt_state = tx.update(gradients, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), "batch_stats": batch_stats}, opt_state

    return variables, tx.init(variables["params"]), step


def by_nnx():
    model = models.NNXResNet(jnx, nnx.Rngs(0))
    nnx.update(model, models.with_values(nnx.state(model), np.random.default_rng(1)))
    model = tools.freeze(model, FIRST["nnx"])
    opt = nnx.Optimizer(model, optimizer(tools.frozen_param_mask(model, FIRST["nnx"])), wrt=nnx.Param)
    graph, state, opt_state = *nnx.split(model), nnx.split(opt)

    @jax.jit
    def step(state, opt_state):
        model, opt = nnx.merge(graph, state), nnx.merge(*opt_state)
        model.train()  # as training loops do each epoch
        opt.update(model, nnx.grad(lambda model: loss_of(model(X)))(model))
        return nnx.state(model), nnx.split(opt)

    return state, opt_state, step


@pytest.mark.parametrize("api", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
def test_only_what_is_not_frozen_moves(api):
    state, opt_state, step = {"linen": by_linen, "nnx": by_nnx}[api]()
    before = flat(state)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):
            state, opt_state = step(state, opt_state)
    after = flat(state)
    still = {path for path, value in before.items() if np.array_equal(value, after[path])}
    assert still == {path for path in before if re.match(OF_FIRST[api], path)} and len(still) == 5 * (2 + 2 + 2)
    assert all(np.isfinite(a).all() for a in after.values())


@pytest.mark.parametrize("api", [pytest.param("linen", marks=pytest.mark.slow), pytest.param("nnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_evaluation_where_all_is_frozen(api, dtype):
    """Of the same program, to the last bit."""
    x = jnp.asarray(X, dtype)
    if api == "linen":
        model = models.ResNet(jnn, jnp.dtype(dtype))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=True))
        variables = models.with_values(shapes, np.random.default_rng(1))
        run = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]), static_argnames="train")
        y, updates = run(tools.freeze(variables), x, train=True)
        want, _ = run(variables, x, train=False)
        jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], tools.freeze(variables)["batch_stats"])
    else:
        model = models.NNXResNet(jnx, nnx.Rngs(0), jnp.dtype(dtype))
        nnx.update(model, models.with_values(nnx.state(model), np.random.default_rng(1)))
        run = nnx.jit(lambda model, x: model(x))
        with jax.numpy_dtype_promotion("standard"):  # bfloat16 beside running statistics of float32
            y = run(tools.freeze(model), x)
            want = run(nnx.view(model, use_running_average=True), x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(want, np.float32))

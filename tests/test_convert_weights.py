"""Models of Haiku, Keras and Equinox in NNX and Linen: outputs in training and evaluation, for several steps; and refusals."""

import os

import flax.linen as nn
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
# Some ten layers, each with sums of at most 150 products of size one in float32, two orders of summation, and divisions by a standard
# deviation that may be a tenth of what it is of.
ATOL = 10 * 150 * 10 * 2**-24
call = nnx.jit(lambda model, x: model(x))


@pytest.fixture(autouse=True)
def _as_they_are():
    """All three rely on JAX's promotion of dtypes, one of them on that of ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


class Net(nnx.Module):
    """A convolution, a grouped one, attention over the positions, and a head: channels last."""

    def __init__(self, norms=jnx, track_count=True, flatten=True, padding="SAME"):
        rngs = nnx.Rngs(0)
        count = {"track_count": True} if track_count else {}
        self.conv = nnx.Conv(3, 8, (3, 3), padding=padding, rngs=rngs)
        self.norm = norms.BatchNorm(8, momentum=0.9, rngs=rngs, **count)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=8, padding=padding, rngs=rngs)
        self.group_norm = norms.GroupNorm(8, num_groups=2, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.row_norm = norms.LayerNorm(8, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(8 * 16 if flatten else 8, 3, rngs=rngs)
        self.flatten = flatten

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = self.group_norm(self.grouped(x))
        y = x.reshape(len(x), -1, 8)
        y = self.row_norm(y + self.attention(y))
        return self.head(y.reshape(len(x), -1) if self.flatten else y.mean(1))


def net(**options):
    """Abstract: nothing is initialized."""
    return nnx.eval_shape(lambda: Net(**options))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.relu(jnn.BatchNorm(use_running_average=not train, momentum=0.9, track_count=True, name="norm")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="grouped")(x)
        x = jnn.GroupNorm(num_groups=2, epsilon=1e-5, name="group_norm")(x)
        y = x.reshape(len(x), -1, 8)
        y = jnn.LayerNorm(epsilon=1e-5, name="row_norm")(y + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y))
        return nn.Dense(3, name="head")(y.reshape(len(x), -1))


@pytest.fixture
def images(rng):
    return [(rng.normal(size=(5, 4, 4, 3)) + i).astype(np.float32) for i in range(3)]


def check(model, train, evaluate, images):
    """`train(x)` and `evaluate(x)` are the source's; it keeps its state."""
    for x in images:
        model.eval()
        close(call(model, x), evaluate(x))
        model.train()
        close(call(model, x), train(x))


# --- Haiku ----------------------------------------------------------------------------------------------------------------------------


def haiku_net(x, train):
    hk = pytest.importorskip("haiku", reason="dm-haiku is an optional test dependency")
    x = hk.Conv2D(8, 3, name="conv")(x)
    x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name="norm")(x, train))
    x = hk.Conv2D(8, 3, feature_group_count=8, name="grouped")(x)
    x = hk.GroupNorm(2, name="group_norm")(x)
    y = x.reshape(len(x), -1, 8)
    init = hk.initializers.VarianceScaling(1.0)
    y = y + hk.MultiHeadAttention(2, 4, w_init=init, model_size=8, name="attention")(y, y, y)
    y = hk.LayerNorm(-1, True, True, name="row_norm")(y)
    return hk.Linear(3, name="head")(y.reshape(len(x), -1))


@pytest.fixture
def haiku(rng, images):
    """-> the compiled apply, and trees as a step of a training leaves them."""
    hk = pytest.importorskip("haiku", reason="dm-haiku is an optional test dependency")
    pure = hk.transform_with_state(haiku_net)
    params, state = jax.eval_shape(lambda x: pure.init(jax.random.key(0), x, True), images[0])
    params = jax.tree.map(
        lambda a: (rng.normal(size=a.shape) / max(a.size // a.shape[-1], 1) ** 0.5 + (a.ndim == 1)).astype(a.dtype), params
    )
    run = jax.jit(lambda params, state, x, train: pure.apply(params, state, None, x, train), static_argnums=3)
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state)
    return run, params, run(params, state, images[1], True)[1]


def running(run, params, state):
    """-> train and evaluate."""
    kept = [state]

    def train(x):
        y, kept[0] = run(params, kept[0], x, True)
        return y

    return train, lambda x: run(params, kept[0], x, False)[0]


def test_haiku_to_nnx(haiku, images):
    run, params, state = haiku
    weights = convert.weights_of_haiku(params, state)
    check(convert.load(net(), weights), *running(run, params, state), images[:2])


@pytest.mark.slow
def test_haiku_to_linen(haiku, images):
    run, params, state = haiku
    train, evaluate = running(run, params, state)
    model = LinenNet()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images[0], False))
    variables = convert.load_linen(model, shapes, convert.weights_of_haiku(params, state), images[0], train=False)
    close(jax.jit(model.apply, static_argnums=2)(variables, images[0], False), evaluate(images[0]))
    for x in images[:2]:
        y, updates = model.apply(variables, x, True, mutable=["batch_stats"])
        variables = {**variables, **updates}
        close(y, train(x))


def test_haiku_refusals(haiku):
    run, params, state = haiku
    weights = convert.weights_of_haiku(params, state)
    with refuses("norm: the average is debiased", "track_count=True", "without_options"):
        convert.load(net(track_count=False), weights)
    assert float(convert.load(net(track_count=False), weights.without_options()).norm.mean[0]) == weights.values["norm.mean"][0]
    fewer = {name: entries for name, entries in params.items() if name != "head"}
    with refuses("Missing: ", "'head.kernel' (of head", "Not in the model: 'tail.kernel' (like 'head.kernel')"):
        convert.load(net(), convert.weights_of_haiku({**fewer, "tail": {"w": np.ones(3), "b": np.ones(3)}}, state)._replace())
    with refuses("conv: 'conv.kernel' has the shape (3, 3, 3, 7), the model needs (3, 3, 3, 8)"):
        convert.load(net(), convert.weights_of_haiku({**params, "conv": {**params["conv"], "w": np.ones((3, 3, 3, 7))}}, state))
    slower = net()
    slower.norm.momentum = 0.99
    with refuses("mean of 'norm'", "hidden / (1 - 0.99**1)"):
        convert.load(slower, weights)
    with refuses("layers='nothing'", "'attention'", "'conv'"):
        convert.load(net(), weights, layers="nothing")
    with refuses("flattened='nothing' matches none of the layers", "'conv'"):
        convert.load(net(), weights, flattened={"nothing": (2, 2)})
    with refuses("no arrays"):
        convert.weights_of_haiku({})


def test_renamed_and_partial(haiku):
    run, params, state = haiku
    renamed = {f"net/~/{name}": entries for name, entries in params.items()}
    moved = {f"net/~/{name}": entries for name, entries in state.items()}
    weights = convert.weights_of_haiku(renamed, moved)
    model = convert.load(net(), weights, rename={"^": "net/"})
    np.testing.assert_array_equal(model.conv.kernel[...], params["conv"]["w"])
    before = convert.load(net(), weights, rename={"^": "net/"})
    before.head.kernel[...] += 1
    before.conv.kernel[...] += 1
    some = convert.load(before, weights, rename=lambda path: f"net/{path}", layers="conv")
    np.testing.assert_array_equal(some.conv.kernel[...], params["conv"]["w"])
    np.testing.assert_array_equal(some.head.kernel[...], before.head.kernel[...])


# --- Keras ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keras():
    return pytest.importorskip("keras", reason="Keras is an optional test dependency")


def keras_net(keras, rng):
    layers = keras.layers
    x = inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(8, 3, padding="same", name="conv")(x)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.8, name="norm")(x))
    x = layers.DepthwiseConv2D(3, padding="same", name="grouped")(x)
    x = layers.GroupNormalization(2, epsilon=1e-2, name="group_norm")(x)
    y = layers.Reshape((16, 8))(x)
    y = layers.Add()([y, layers.MultiHeadAttention(2, 4, name="attention")(y, y)])
    y = layers.LayerNormalization(name="row_norm")(y)
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(y)))
    for variable in model.weights:
        scale = "gamma" in variable.name or "variance" in variable.name
        drawn = rng.uniform(0.5, 1.5, variable.shape) if scale else rng.normal(size=variable.shape) / max(variable.shape[-1], 4) ** 0.5 / 2
        if "seed" not in variable.name:
            variable.assign(drawn)
    return model


def running_keras(source):
    """-> train and evaluate, compiled; the source stays as it is."""
    kept = [[v.value for v in source.non_trainable_variables]]
    weights = [v.value for v in source.trainable_variables]
    run = jax.jit(source.stateless_call, static_argnames="training")

    def train(x):
        y, kept[0] = run(weights, kept[0], x, training=True)
        return y

    return train, lambda x: run(weights, kept[0], x, training=False)[0]


@pytest.mark.slow
def test_keras_to_nnx(keras, rng, images):
    """Epsilon and momentum are taken over too, which the model here has otherwise."""
    source = keras_net(keras, rng)
    model = convert.load(net(track_count=False), convert.weights_of_keras(source))
    assert (model.norm.momentum, model.norm.epsilon, model.group_norm.epsilon) == (0.8, 1e-3, 1e-2)
    check(model, *running_keras(source), images[:2])
    counted = convert.load(net(), convert.weights_of_keras(source))
    assert float(counted.norm.count[...]) == pytest.approx(5)  # the limit, 1 / (1 - 0.8)


@pytest.mark.slow
def test_keras_by_order(keras, rng, images):
    """A sequential model whose layers have the names that Keras gave them."""
    layers = keras.layers
    source = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layers.Conv2D(8, 3, padding="valid", use_bias=False),
            layers.BatchNormalization(momentum=0.5),
            layers.Activation("relu"),
            keras.Sequential([layers.Conv2D(4, 1), layers.GroupNormalization(-1)]),
            layers.Flatten(),
            layers.Dense(6),
            layers.LayerNormalization(),
        ]
    )
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(3, 8, (3, 3), padding="VALID", use_bias=False, rngs=rngs),
        nnx.BatchNorm(8, rngs=rngs),
        nnx.relu,
        nnx.Sequential(nnx.Conv(8, 4, (1, 1), rngs=rngs), jnx.InstanceNorm(4, rngs=rngs)),
        lambda x: x.reshape(len(x), -1),
        nnx.Linear(4 * 2 * 2, 6, rngs=rngs),
        jnx.LayerNorm(6, rngs=rngs),
    )
    model = convert.load(model, convert.weights_of_keras(source), match="order")
    assert model.layers[1].momentum == 0.5 and model.layers[6].epsilon == 1e-3
    check(model, *running_keras(source), images[:2])


def test_keras_refusals(keras, rng):
    weights = convert.weights_of_keras(keras_net(keras, rng))
    model = LinenNet()
    x = jnp.ones((2, 4, 4, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, False))
    with refuses("norm: epsilon is 1e-05 here, 0.001 there", "norm: momentum is 0.9 here, 0.8 there", "group_norm: epsilon"):
        convert.load_linen(model, shapes, weights, x, train=False)
    assert set(convert.load_linen(model, shapes, weights.without_options(), x, train=False)) == {"params", "batch_stats"}
    other = nnx.Dict({"conv": nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), "norm": jnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0))})
    with refuses("Not in the model: 'norm.mean'"):
        convert.load(other, weights)
    with refuses("norm: GroupNorm here, BatchNorm there"):
        convert.load(other, weights, ignore=[key for key in weights.values if not key.startswith(("conv", "norm.scale", "norm.bias"))])
    with refuses("build it, or call it once"):
        convert.weights_of_keras(keras.Sequential([keras.layers.Dense(3)]))


def test_keras_spectral_normalization(keras, rng):
    """Kernels that are overwritten in training: equal to a plain layer in evaluation, to jnorm's own in training."""
    source = keras.layers.SpectralNormalization(keras.layers.Dense(5), name="dense", power_iterations=2)
    x = rng.normal(size=(4, 6)).astype(np.float32)
    source.build(x.shape)
    weights, rngs = convert.weights_of_keras(source), nnx.Rngs(0)
    model = nnx.Dict({"dense": jnx.SpectralNorm(nnx.Linear(6, 5, rngs=rngs), n_steps=2, rngs=rngs)})
    model = convert.load(model, weights)
    for _ in range(2):
        close(model["dense"](x, update_stats=True), source(x, training=True))
    plain = convert.load(nnx.Dict({"dense": nnx.Linear(6, 5, rngs=rngs)}), convert.weights_of_keras(source))
    close(plain["dense"](x), source(x, training=False))


# --- Equinox --------------------------------------------------------------------------------------------------------------------------


def equinox_net(eqx, rng):
    keys = iter(jax.random.split(jax.random.key(0), 8))

    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        grouped: eqx.nn.Conv2d
        group_norm: eqx.nn.GroupNorm
        attention: eqx.nn.MultiheadAttention
        row_norm: eqx.nn.LayerNorm
        head: eqx.nn.Linear

        def __init__(self):
            self.conv = eqx.nn.Conv2d(3, 8, 3, padding=1, key=next(keys))
            self.norm = eqx.nn.BatchNorm(8, "batch", momentum=0.7, mode="batch")
            self.grouped = eqx.nn.Conv2d(8, 8, 3, padding=1, groups=8, key=next(keys))
            self.group_norm = eqx.nn.GroupNorm(2, 8, eps=1e-2)
            bias = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True)
            self.attention = eqx.nn.MultiheadAttention(2, 8, key=next(keys), **bias)
            self.row_norm = eqx.nn.LayerNorm(8)
            self.head = eqx.nn.Linear(8 * 16, 3, key=next(keys))

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            x = self.group_norm(self.grouped(jax.nn.relu(x)))
            y = x.reshape(8, 16).T
            y = jax.vmap(self.row_norm)(y + self.attention(y, y, y))
            return self.head(y.T.reshape(-1)), state  # channels first

    model, state = eqx.nn.make_with_state(Model)()
    drawn = [
        jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype) for a in (model.norm.weight, model.group_norm.bias, model.row_norm.weight)
    ]
    return eqx.tree_at(lambda m: [m.norm.weight, m.group_norm.bias, m.row_norm.weight], model, drawn), state


@pytest.mark.slow
def test_equinox_to_nnx(rng, images):
    """From channels first, whose flattened features lie in another order."""
    eqx = pytest.importorskip("equinox", reason="Equinox is an optional test dependency")
    source, state = equinox_net(eqx, rng)

    @eqx.filter_jit
    def run(source, state, x, inference):
        source = eqx.nn.inference_mode(source, inference)
        x = jnp.moveaxis(x, -1, 1)
        return jax.vmap(source, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)

    _, state = run(source, state, images[1], False)
    model = convert.load(net(), convert.weights_of_equinox(source, state), flattened={"head": (8, 16)})
    assert (model.norm.momentum, model.group_norm.epsilon) == (0.7, 1e-2)
    kept = [state]

    def train(x):
        y, kept[0] = run(source, kept[0], x, False)
        return y

    check(model, train, lambda x: run(source, jax.tree.map(lambda a: a, kept[0]), x, True)[0], images[:2])


@pytest.mark.slow
def test_equinox_wrappers(rng):
    eqx = pytest.importorskip("equinox", reason="Equinox is an optional test dependency")
    keys, rngs, x = jax.random.split(jax.random.key(0), 3), nnx.Rngs(0), rng.normal(size=(4, 6)).astype(np.float32)

    class Model(eqx.Module):
        weight: eqx.nn.WeightNorm
        spectral: eqx.nn.SpectralNorm

        def __init__(self):
            self.weight = eqx.nn.WeightNorm(eqx.nn.Linear(6, 5, key=keys[0]))
            self.spectral = eqx.nn.SpectralNorm(eqx.nn.Linear(5, 3, key=keys[1]), "weight", key=keys[2])

        def __call__(self, x, state):
            return self.spectral(self.weight(x), state)

    source, state = eqx.nn.make_with_state(Model)()
    source = eqx.tree_at(lambda m: m.weight.g, source, 2 * source.weight.g)
    source = eqx.nn.inference_mode(source)
    want = jax.vmap(source, in_axes=(0, None), out_axes=(0, None))(x, state)[0]
    weights = convert.weights_of_equinox(source, state)
    plain = nnx.Dict({"weight": nnx.Linear(6, 5, rngs=rngs), "spectral": nnx.Linear(5, 3, rngs=rngs)})
    wrapped = nnx.Dict({"weight": jnx.WeightNorm(plain["weight"], rngs=rngs), "spectral": jnx.SpectralNorm(plain["spectral"], rngs=rngs)})
    for model in (convert.load(plain, weights), convert.load(wrapped, weights)):
        model.eval()
        # The vectors of Equinox's have converged over the 15 steps that it starts with, to a thousandth here.
        np.testing.assert_allclose(model["spectral"](model["weight"](x)), want, rtol=0, atol=ATOL if model["weight"] is None else 1e-3)
    with refuses("spectral: a SpectralNorm of Equinox", "State"):
        convert.weights_of_equinox(source)

"""Models of PyTorch, to NNX and Linen and back: equal outputs in float64, where only a wrong layout can differ, and what is refused."""

import functools
import warnings

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
import models
from jnorm.tools import convert
from refusals import refuses

torch = pytest.importorskip("torch", reason="PyTorch is an optional test dependency")

import torch_models  # noqa: E402

# Numbers of order one, through twenty layers.
ATOL = 1e-11
# Flax's attention has its logits in float32: five of them are weighed, and the rest is as exact as above.
ATTENTION = 16 * 2**-24
# Running statistics of order one are float32 here.
STATISTICS = 4 * 2**-24


@pytest.fixture(autouse=True)
def _float64(x64):
    with jax.numpy_dtype_promotion("standard"):
        yield


def images(rng):
    """Of odd sizes all the way: there "SAME" is PyTorch's padding at a stride of 2 too."""
    return rng.normal(size=(4, 9, 9, 3))


def theirs(model, x):
    x = np.moveaxis(x, -1, 1) if x.ndim == 4 else x
    with torch.no_grad():
        return model(torch.tensor(x.copy())).numpy()


def resnet(norms=jnx):
    """With PyTorch's padding."""
    model = models.NNXResNet(norms, nnx.Rngs(0), jnp.float64)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv):
            module.padding = module.kernel_size[0] // 2
    return model


@functools.partial(jax.jit, static_argnums=0)
def call(graphdef, state, x):
    model = nnx.merge(graphdef, state)
    return model(x), nnx.state(model)


def run(model, x):
    y, state = call(*nnx.split(model), x)
    nnx.update(model, state)
    return np.asarray(y)


def largest(a, b):
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


@pytest.mark.parametrize(
    "modes", [("eval",), pytest.param(("eval", "train", "then eval"), marks=pytest.mark.slow)], ids=["evaluation", "training"]
)
def test_resnet(modes, rng):
    """Evaluation, a step of training, evaluation, of the model that came and of the one that went back."""
    source, x = torch_models.trained(torch_models.ResNet().double(), rng), images(rng)
    given = nnx.eval_shape(resnet)
    model = convert.load(given, source, rename=torch_models.resnet_name)
    assert given.norm.running_var_correction == 0
    back = torch_models.ResNet().double()
    back.load_state_dict(convert.to_torch(model, rename=torch_models.resnet_name))
    differences = {}
    for mode in modes:
        for one in (model, source, back):
            one.eval() if "eval" in mode else one.train()
        want = theirs(source, x)
        np.testing.assert_array_equal(theirs(back, x), want)
        # Evaluation after a step sees running statistics that were rounded.
        atol = ATOL if mode != "then eval" else 20 * STATISTICS * abs(want).max()
        differences[mode] = largest(run(model, x), want)
        assert differences[mode] < atol, mode
    statistics = {key: a.numpy() for key, a in source.state_dict().items() if "running" in key}
    ours = {key: a.numpy() for key, a in convert.to_torch(model, rename=torch_models.resnet_name).items() if "running" in key}
    assert statistics.keys() == ours.keys()
    differences["statistics"] = max(largest(ours[key], statistics[key]) for key in statistics)
    for key, there in statistics.items():
        np.testing.assert_allclose(ours[key], there, rtol=0, atol=STATISTICS * max(abs(there).max(), 1), err_msg=key)
    print("ResNet-18, largest differences:", differences)


def test_linen_resnet(rng):
    """By order: what is called one after the other here is defined so there. The values alone, as Flax's padding is "SAME"."""
    source, x = torch_models.trained(torch_models.ResNet().double(), rng), images(rng)
    model = models.ResNet(jnn, jnp.float64)
    variables = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), x)
    loaded = convert.load_linen(model, variables, source.state_dict(), x, match="order", train=False)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    apply = jax.jit(lambda variables: model.apply(variables, x, train=False))
    assert largest(apply(loaded), theirs(source.eval(), x)) < ATOL
    state = convert.to_torch_linen(model, loaded, x, train=False)
    for (key, there), (name, here) in zip(source_parameters(source), state.items(), strict=True):
        np.testing.assert_array_equal(here.numpy(), there.numpy(), err_msg=f"{key} is {name}")


def source_parameters(source):
    """In the order of the layers."""
    return [(key, t if "tracked" not in key else torch.zeros((), dtype=torch.int64)) for key, t in source.state_dict().items()]


def transformer():
    return models.NNXTransformer(jnx, nnx.Rngs(0), jnp.float64)


def test_transformer(rng):
    source = torch_models.trained(torch_models.Transformer().double(), rng)
    x = rng.normal(size=(2, 5, 8))
    model = convert.load(transformer(), source)
    assert model.norm.epsilon == 1e-5  # PyTorch's, where jnorm's default is 1e-6
    difference = largest(run(model, x), theirs(source, x))
    print("transformer, largest difference:", difference)
    assert difference < ATTENTION
    state = convert.to_torch(model)
    assert state.keys() == source.state_dict().keys()
    for key, tensor in source.state_dict().items():
        np.testing.assert_array_equal(state[key].numpy(), tensor.numpy(), err_msg=key)


@pytest.mark.slow
def test_linen_transformer(rng):
    """Whose attention is one layer here, of four."""
    source = torch_models.trained(torch_models.Transformer().double(), rng)
    x = rng.normal(size=(2, 5, 8))
    model = models.Transformer(jnn, jnp.float64)
    variables = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), x)
    names = {
        "LayerNorm_0": "block/norm1",
        "LayerNorm_1": "norm",
        "RMSNorm_0": "block/norm2",
        "MultiHeadDotProductAttention_0": "block/attention",
        "Dense_0": "block/down",
        "Dense_1": "block/up",
        "Dense_2": "dense",
    }
    with refuses("LayerNorm_0: epsilon is 1e-06 here, 1e-05 there", "source.state_dict()"):
        convert.load_linen(model, variables, source, x, rename=names, train=False)
    for module in source.modules():
        if hasattr(module, "normalized_shape"):
            module.eps = 1e-6
    loaded = convert.load_linen(model, variables, source, x, rename=names, train=False)
    assert largest(model.apply(loaded, x, train=False), theirs(source, x)) < ATTENTION
    state = convert.to_torch_linen(model, loaded, x, rename=names, train=False)
    for key, tensor in source.state_dict().items():
        np.testing.assert_array_equal(state[key].numpy(), tensor.numpy(), err_msg=key)


# --- Layers, each alone -----------------------------------------------------------------------------------------------------------------


def conv_transpose(**options):
    return lambda rngs: nnx.ConvTranspose(4, 6, (3, 2), rngs=rngs, **options)


CASES = {
    "Linear": (lambda: torch.nn.Linear(4, 6), lambda rngs: nnx.Linear(4, 6, rngs=rngs), (3, 4)),
    "Linear-no-bias": (lambda: torch.nn.Linear(4, 6, bias=False), lambda rngs: nnx.Linear(4, 6, use_bias=False, rngs=rngs), (3, 4)),
    "Conv1d": (
        lambda: torch.nn.Conv1d(4, 6, 3, stride=2, padding=2),
        lambda rngs: nnx.Conv(4, 6, 3, strides=2, padding=2, rngs=rngs),
        (2, 7, 4),
    ),
    "Conv2d-groups": (
        lambda: torch.nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2, padding="same"),
        lambda rngs: nnx.Conv(4, 6, (3, 2), feature_group_count=2, kernel_dilation=2, rngs=rngs),
        (2, 7, 8, 4),
    ),
    "Conv2d-circular": (
        lambda: torch.nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        lambda rngs: nnx.Conv(4, 6, (3, 3), padding="CIRCULAR", rngs=rngs),
        (2, 7, 8, 4),
    ),
    "Conv3d-depthwise": (
        lambda: torch.nn.Conv3d(4, 8, (3, 2, 1), groups=4),
        lambda rngs: nnx.Conv(4, 8, (3, 2, 1), feature_group_count=4, padding="VALID", rngs=rngs),
        (2, 4, 5, 3, 4),
    ),
    "ConvTranspose2d": (
        lambda: torch.nn.ConvTranspose2d(4, 6, (3, 2), stride=2),
        conv_transpose(strides=(2, 2), padding="VALID"),
        (2, 4, 5, 4),
    ),
    "ConvTranspose2d-transposed-kernel": (
        lambda: torch.nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=1, output_padding=(1, 0)),
        lambda rngs: nnx.ConvTranspose(4, 6, (3, 2), strides=(2, 1), padding=[(1, 2), (0, 0)], transpose_kernel=True, rngs=rngs),
        (2, 4, 5, 4),
    ),
    "Embed": (lambda: torch.nn.Embedding(7, 6), lambda rngs: nnx.Embed(7, 6, rngs=rngs), None),
    "PReLU": (lambda: torch.nn.PReLU(), lambda rngs: nnx.PReLU(), (3, 4)),
}


def fast(names, *slow):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("name", fast(CASES, "Linear", "Conv1d", "Conv2d-circular", "ConvTranspose2d-transposed-kernel", "Embed"))
def test_layers(name, rng):
    there, here, shape = CASES[name]
    source, model = there().double(), here(nnx.Rngs(0))
    model = convert.load(jax.tree.map(lambda a: a.astype(jnp.float64), model), source)
    x = rng.integers(0, 7, size=(3, 4)) if shape is None else rng.normal(size=shape)
    second = len(x.shape) > 2
    want = source(torch.tensor((np.moveaxis(x, -1, 1) if second else x).copy())).detach().numpy()
    assert largest(model(x), np.moveaxis(want, 1, -1) if second else want) < ATOL
    for key, tensor in convert.to_torch(model).items():
        np.testing.assert_array_equal(tensor.numpy(), source.state_dict()[key].numpy())


# --- Parametrizations -------------------------------------------------------------------------------------------------------------------


def old_weight_norm(module, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(module, **options)


def wide(model):
    return jax.tree.map(lambda a: a.astype(jnp.float64), model)


NEW = torch.nn.utils.parametrizations
LENGTHS = {
    "Linear": (lambda: NEW.weight_norm(torch.nn.Linear(4, 6)), lambda r: nnx.Linear(4, 6, rngs=r), -1, (3, 4)),
    "one-length": (lambda: NEW.weight_norm(torch.nn.Linear(4, 6), dim=None), lambda r: nnx.Linear(4, 6, rngs=r), None, (3, 4)),
    "old-names": (lambda: old_weight_norm(torch.nn.Linear(4, 4), dim=1), lambda r: nnx.Linear(4, 4, rngs=r), 0, (3, 4)),
    "Conv2d": (lambda: NEW.weight_norm(torch.nn.Conv2d(4, 6, 3)), lambda r: nnx.Conv(4, 6, (3, 3), padding=0, rngs=r), -1, (2, 4, 5, 4)),
    "ConvTranspose2d": (
        lambda: NEW.weight_norm(torch.nn.ConvTranspose2d(4, 6, 3)),
        lambda r: nnx.ConvTranspose(4, 6, (3, 3), padding="VALID", rngs=r),
        -2,
        (2, 4, 5, 4),
    ),
}


@pytest.mark.parametrize("name", fast(LENGTHS, "Linear", "one-length"))
def test_weight_norm(name, rng):
    """Into the wrapper, into a plain layer, and back from the wrapper."""
    there, here, axes, shape = LENGTHS[name]
    source, x = there().double(), rng.normal(size=shape)
    with torch.no_grad():
        for tensor in source.parameters():
            tensor.mul_(torch.tensor(rng.uniform(0.5, 2, size=tensor.shape)))
    want = source(torch.tensor(np.moveaxis(x, -1, 1).copy())).detach().numpy()
    want = np.moveaxis(want, 1, -1)
    wrapped = wide(jnx.WeightNorm(here(nnx.Rngs(0)), feature_axes=axes, rngs=nnx.Rngs(0)))
    wrapped = convert.load(wrapped, source)
    assert largest(wrapped(x), want) < ATOL
    assert largest(convert.load(wide(here(nnx.Rngs(0))), source)(x), want) < ATOL
    back, state = there().double(), convert.to_torch(wrapped)
    if name == "old-names":
        state = {
            key.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): a
            for key, a in state.items()
        }
    back.load_state_dict(state)
    for key, tensor in source.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[key].numpy(), tensor.numpy(), err_msg=key)


def spectral(module, steps):
    return NEW.spectral_norm(module, n_power_iterations=steps).double()


@pytest.mark.parametrize("kind", fast(["Linear", "Conv2d", "ConvTranspose2d"], "Linear", "Conv2d"))
def test_spectral_norm(kind, rng):
    """A plain layer gives PyTorch's evaluation. The wrapper's estimate is half a step of the power iteration later, so that it lies between
    PyTorch's in evaluation and its next one in training: each half step makes it larger."""
    args = (4, 6) if kind == "Linear" else (4, 6, 3)
    here = {
        "Linear": lambda r: nnx.Linear(4, 6, rngs=r),
        "Conv2d": lambda r: nnx.Conv(4, 6, (3, 3), padding=0, rngs=r),
        "ConvTranspose2d": lambda r: nnx.ConvTranspose(4, 6, (3, 3), padding="VALID", rngs=r),
    }[kind]
    source, x = spectral(getattr(torch.nn, kind)(*args), 1), rng.normal(size=(3, 4) if kind == "Linear" else (2, 4, 5, 4))
    moved = torch.tensor(np.moveaxis(x, -1, 1).copy())
    source.train()(moved)
    want = np.moveaxis(source.eval()(moved).detach().numpy(), 1, -1)
    assert largest(convert.load(wide(here(nnx.Rngs(0))), source)(x), want) < ATOL
    wrapped = convert.load(wide(jnx.SpectralNorm(here(nnx.Rngs(0)), param_dtype=jnp.float64, rngs=nnx.Rngs(0))), source)
    w = source.parametrizations.weight.original.detach()
    stored = float((w / source.weight).detach().mean())
    assert abs(float(wrapped.batch_stats[("kernel", "sigma")][...]) - stored) < ATOL
    state = convert.to_torch(wrapped)
    for key, tensor in source.state_dict().items():
        assert largest(state[key], tensor) < ATOL, key
    wrapped(x, update_stats=True)
    source.train()(moved)
    following = float((w / source.eval().weight).detach().mean())
    assert stored - ATOL <= float(wrapped.batch_stats[("kernel", "sigma")][...]) <= following + ATOL


def test_flattening(rng):
    """What was flattened with the channels first."""
    source = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2), torch.nn.LayerNorm((4, 2, 3)), torch.nn.Flatten(), torch.nn.BatchNorm1d(24), torch.nn.Linear(24, 5)
    ).double()
    torch_models.trained(source, rng)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (2, 2), padding="VALID", rngs=rngs)
            self.layer_norm = jnx.LayerNorm(24, reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3), rngs=rngs)
            self.batch_norm = jnx.BatchNorm(24, rngs=rngs)
            self.dense = nnx.Linear(24, 5, rngs=rngs)

        def __call__(self, x):
            y = self.layer_norm(self.conv(x))
            return self.dense(self.batch_norm(y.reshape(len(y), -1)))

    def widened():
        model = Net(nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda a: a.astype(jnp.float64), nnx.state(model, nnx.Param)))
        return model

    flattened = {"*_norm": (4, 2, 3), "dense": (4, 2, 3)}
    model = convert.load(widened(), source, match="order", flattened=flattened)
    x = rng.normal(size=(2, 3, 4, 3))
    assert largest(nnx.view(model, use_running_average=True)(x), theirs(source.eval(), x)) < ATOL
    names = {"conv": "0", "layer_norm": "1", "batch_norm": "3", "dense": "4"}
    state = convert.to_torch(model, rename=names, flattened=flattened)
    for key, tensor in source.state_dict().items():
        assert "tracked" in key or largest(state[key], tensor) == 0, key


def test_linen_wrappers(rng):
    """What a wrapper holds lies beside the layer there."""

    class Wrapped(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = jnn.WeightNorm(linen.Dense(6, param_dtype=jnp.float64), param_dtype=jnp.float64)(x)
            return jnn.SpectralNorm(linen.Dense(5, param_dtype=jnp.float64), param_dtype=jnp.float64)(x, update_stats=False)

    source = torch.nn.Sequential(NEW.weight_norm(torch.nn.Linear(4, 6)), NEW.spectral_norm(torch.nn.Linear(6, 5), n_power_iterations=200))
    source.double()(torch.zeros(1, 4).double())  # the power iteration has come to its end
    x = rng.normal(size=(3, 4))
    model = Wrapped()
    variables = convert.load_linen(model, model.init(jax.random.key(0), x), source.eval(), x, match="order")
    assert largest(model.apply(variables, x), theirs(source, x)) < 1e-6  # whose two ends differ by what float64 leaves of the second value
    state = convert.to_torch_linen(model, variables, x, rename={"Dense_": ""})
    for key, tensor in source.state_dict().items():
        assert largest(state[key], tensor) < ATOL, key

"""What does not fit a conversion from PyTorch is told at once, by key and by layer; what may be left is; nothing that was given changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.nnx as jnx
import oracles
from jnorm.tools import convert
from refusals import refuses

torch = pytest.importorskip("torch", reason="PyTorch is an optional test dependency")


class Net(nnx.Module):
    def __init__(self, rngs, norms=jnx, **options):
        self.conv = nnx.Conv(3, 4, (3, 3), padding=1, rngs=rngs)
        self.norm = norms.BatchNorm(4, rngs=rngs, **options)
        self.dense = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.norm(self.conv(x)).mean((1, 2)))


class Source(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4, **options)
        self.dense = torch.nn.Linear(4, 2)


@functools.cache
def net(**options):
    """One for all tests: nothing changes it."""
    return Net(nnx.Rngs(0), **options)


def test_keys_that_are_missing_or_left_over():
    state = Source().state_dict()
    state["dence.weight"] = state.pop("dense.weight")
    state["conv.weight"] = torch.zeros(4, 3, 5, 5)
    with refuses(
        "Missing: 'dense.weight' (of dense; like 'dence.weight', which is there)",
        "Not in the model: 'dence.weight' (like 'dense.weight')",
        "conv: 'conv.weight' has the shape (4, 3, 5, 5), the model needs (4, 3, 3, 3)",
        "rename=",
    ):
        convert.load(net(), state)


def test_many_keys_are_counted():
    state = {f"{i}.weight": np.zeros(2) for i in range(30)}
    with refuses("and 18 more"):
        convert.load(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), state)


def test_a_part_of_a_model():
    """A new head: layers of the model that are not set, and keys of the source that are not used."""
    source, model = Source(), net()
    state = {
        ("head" if key.startswith("dense") else key.split(".")[0]) + "." + key.split(".")[1]: t for key, t in source.state_dict().items()
    }
    with refuses("Missing: 'dense.weight'", "'head.weight'"):
        convert.load(model, state)
    with refuses("Not in the model: 'head.weight'"):
        convert.load(model, state, layers=["conv", "norm"])
    with refuses("'tail.*' matches none of the keys of the source", "head.weight"):
        convert.load(model, state, ignore=["tail.*"])
    with refuses("'dens' matches none of the layers", "'conv', 'norm', 'dense'"):
        convert.load(model, state, layers="dens")
    before = jax.tree.map(np.array, nnx.state(model))
    loaded = convert.load(model, state, layers=["conv", "norm"], ignore=["head.*"])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    np.testing.assert_array_equal(loaded.dense.kernel[...], model.dense.kernel[...])
    np.testing.assert_array_equal(loaded.conv.bias[...], source.conv.bias.detach().numpy())
    assert convert.to_torch(loaded, layers="norm").keys() == {f"norm.{key}" for key in source.norm.state_dict()}


def test_a_wrong_order():
    state = dict(reversed(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict().items()))
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), jnx.BatchNorm(4, rngs=rngs))
    with refuses('match="order"', "number 1 is 'layers/0' with ['bias', 'weight'] here and '1' with", "running_mean"):
        convert.load(model, state, match="order")
    with refuses("has 1 layers", "the source 2", "number 2 is none here"):
        convert.load(nnx.Linear(3, 4, rngs=rngs), {"a.weight": 0, "a.bias": 0, "b.weight": 0}, match="order")
    with refuses("leave rename out"):
        convert.load(model, state, match="order", rename={"a": "b"})
    with refuses("match must be"):
        convert.load(model, state, match="size")


def test_layers_without_a_rule():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.LSTMCell(4, 4, rngs=rngs), jnx.FilterResponseNorm(4, rngs=rngs))
    with refuses("there is no rule for these layers: layers/1 (LSTMCell), layers/2 (FilterResponseNorm)", "layers="):
        convert.load(model, {})
    with refuses("no rule for these layers: layers/1"):
        convert.to_torch(model)
    assert convert.to_torch(model, layers="layers/0").keys() == {"0.weight", "0.bias"}
    with refuses("no parameters"):
        convert.load(nnx.Sequential(nnx.relu), {})


@pytest.mark.parametrize("bad", [3, [1]])
def test_no_source(bad):
    with refuses("source must be a PyTorch module, its state dict", kind=TypeError):
        convert.load(net(), bad)


def test_hyperparameters_are_set():
    given = net(momentum=0.5)
    model = convert.load(given, Source(eps=1e-2, momentum=0.25))
    assert (model.norm.epsilon, model.norm.momentum, model.norm.running_var_correction) == (1e-2, 0.75, 1)
    assert (given.norm.epsilon, given.norm.momentum, given.norm.running_var_correction) == (1e-5, 0.5, 0)
    model = convert.load(given, Source(eps=1e-2).state_dict())
    assert (model.norm.epsilon, model.norm.running_var_correction) == (1e-5, 0)


def test_what_pytorch_counts():
    """A count of ours is of a debiased average: PyTorch's is that with the count at its limit, or the cumulative one."""
    source = Source(momentum=None)
    source.norm.num_batches_tracked.fill_(7)
    with refuses("norm: momentum=None is the cumulative average, which needs track_count=True"):
        convert.load(net(), source)
    model = convert.load(net(track_count=True), source)
    assert (model.norm.momentum, model.norm.count[...].shape, float(model.norm.count[...])) == (None, (), 7)
    assert int(convert.to_torch(model)["norm.num_batches_tracked"]) == 7
    model = convert.load(net(track_count=True), Source(momentum=0.25))
    assert float(model.norm.count[...]) == 4
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    model.norm(x)
    np.testing.assert_allclose(model.norm.mean[...], 0.25 * np.mean(x, 0), atol=4 * 2**-24)


def test_what_flax_and_a_model_cannot_do():
    with refuses("norm: BatchNorm of Flax updates the biased variance", "source.state_dict()"):
        convert.load(net(norms=nnx), Source())
    convert.load(net(norms=nnx), Source().state_dict())
    with refuses("norm: BatchNorm2d without running statistics uses those of the batch always"):
        convert.load(net(), Source(track_running_stats=False))
    source = Source()
    source.norm = torch.nn.GroupNorm(2, 4)
    with refuses("norm: BatchNorm here, GroupNorm there"):
        convert.load(net(), source)


CONVOLUTIONS = {
    "strides": ({"strides": 2, "padding": 1}, {"padding": 1}, "strides is (2, 2) here, (1, 1) there"),
    "same": (
        {"strides": 2},
        {"stride": 2, "padding": 1},
        'padding="SAME" here, padding=[(1, 1), (1, 1)] there, where the name with strides (2, 2) depends on the size of x',
    ),
    "padding": ({"padding": "VALID"}, {"padding": 1}, "padding=[(0, 0), (0, 0)] here, padding=[(1, 1), (1, 1)] there"),
    "mode": ({"padding": 1}, {"padding": 1, "padding_mode": "reflect"}, "reflect there"),
    "groups": ({"feature_group_count": 2}, {"padding": 1}, "groups is 2 here, 1 there"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_that_move_otherwise(name):
    ours, theirs, told = CONVOLUTIONS[name]
    with refuses(told, "Build it so"):
        convert.load(nnx.eval_shape(lambda: nnx.Conv(4, 4, (3, 3), **ours, rngs=nnx.Rngs(0))), torch.nn.Conv2d(4, 4, 3, **theirs))


def test_dtypes_and_abstract_models():
    """The model's dtypes stay, whatever the source's; nothing needs to be initialized for a load."""
    source = Source().bfloat16()
    model = convert.load(nnx.eval_shape(net), source)
    assert model.conv.kernel[...].dtype == jnp.float32
    np.testing.assert_array_equal(model.conv.bias[...], source.conv.bias.detach().float().numpy())
    assert model(jnp.ones((2, 5, 5, 3))).shape == (2, 2)
    narrow = nnx.Linear(4, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    narrow = convert.load(narrow, Source().dense)
    assert narrow.kernel[...].dtype == jnp.bfloat16
    assert convert.to_torch(narrow)["weight"].dtype == torch.bfloat16
    arrays = {key: t.float().numpy() for key, t in source.state_dict().items()}
    again = convert.load(net(), arrays)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again, nnx.Param), nnx.state(model, nnx.Param))


def test_tied_weights_and_parameters_of_ones_own():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.token = nnx.Param(jnp.zeros((1, 3)))
            self.embed = nnx.Embed(5, 3, rngs=rngs)
            self.again = self.embed

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token = torch.nn.Parameter(torch.randn(1, 3))
            self.embed, self.again = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
            self.again.weight = self.embed.weight

    source = Theirs()
    model = convert.load(Tied(nnx.Rngs(0)), source)
    assert model.again is model.embed
    np.testing.assert_array_equal(model.token[...], source.token.detach().numpy())
    np.testing.assert_array_equal(model.embed.embedding[...], source.embed.weight.detach().numpy())
    source.again.weight = torch.nn.Parameter(source.embed.weight.detach().clone())
    with refuses("Not in the model: 'again.weight'"):
        convert.load(Tied(nnx.Rngs(0)), source)


# --- Single norms -----------------------------------------------------------------------------------------------------------------------


def test_modules_that_are_no_norm():
    for module, told in (
        (torch.nn.LocalResponseNorm(3), "call jnorm.local_response_norm with its size, alpha, beta and k"),
        (torch.nn.Linear(2, 2), "Linear is no norm"),
        (torch.nn.LazyBatchNorm1d(), "run it on a batch first"),
        (torch.nn.BatchNorm1d(2, track_running_stats=False), "needs ndim"),
    ):
        with refuses(told):
            convert.of_torch(module)
    with refuses("Linear is no norm that can be converted"):
        convert.of_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_local_response_norm(rng):
    """Without values: the function takes PyTorch's arguments as they are."""
    import jnorm

    x = rng.normal(size=(2, 3, 4, 7)).astype(np.float32)
    for size in (3, 4):
        module = torch.nn.LocalResponseNorm(size, alpha=0.5, beta=0.6, k=1.5)
        want = np.moveaxis(module(torch.tensor(np.moveaxis(x, -1, 1).copy())).numpy(), 1, -1)
        y = jnorm.local_response_norm(x, size=module.size, alpha=module.alpha, beta=module.beta, k=module.k)
        # The power's argument is a sum of at most size + 1 terms, and y is of x's size.
        oracles.assert_close(y, oracles.Bounded(want, abs(x) + abs(want)), size + 8, what="y")


NORM = convert.Norm(
    kind="BatchNorm", shape=(3,), mean=np.zeros(3, np.float32), var=np.ones(3, np.float32), momentum=0.75, running_var_correction=1
)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"running_var_correction": 0}, "dataclasses.replace(norm, running_var_correction=1)"),
        ({"count": 2.0}, "dataclasses.replace(norm, count=None)"),
        ({"activation": "relu"}, "dataclasses.replace(norm, activation=None)"),
        ({"kind": "TrackedInstanceNorm", "momentum": None, "count": 1.0}, "no cumulative average"),
        ({"kind": "LayerNorm", "feature_axes": (1,), "reduction_axes": (1, 2)}, "normalizes the last axes"),
    ],
    ids=["biased", "debiased", "activation", "cumulative", "axes"],
)
def test_norms_that_pytorch_does_not_have(change, told):
    with refuses(told):
        convert.as_torch(dataclasses.replace(NORM, **change))


def test_a_scale_alone():
    norm = dataclasses.replace(NORM, scale=np.full(3, 2, np.float32), count=4.0)  # a count at its limit
    module = convert.as_torch(norm)
    assert module.momentum == 0.25 and module.weight.requires_grad and not module.bias.requires_grad
    assert module.bias.tolist() == [0, 0, 0]
    narrow = convert.as_torch(dataclasses.replace(norm, scale=np.ones(3, jnp.bfloat16), var=np.full(3, 1.01, np.float32)))
    # PyTorch has one dtype for all, and none of the statistics may be rounded.
    assert narrow.weight.dtype == narrow.running_var.dtype == torch.float32 and narrow.running_var[0] == np.float32(1.01)
    assert narrow(torch.ones(2, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    alone = convert.Norm(kind="LayerNorm", shape=(3,), scale=np.ones(3, jnp.bfloat16))
    assert convert.as_torch(alone).weight.dtype == torch.bfloat16


def test_norms_that_cannot_be():
    for options, told in (
        ({"kind": "Dropout"}, "kind must be one of"),
        ({"scale": np.ones(2)}, "scale of a BatchNorm of features (3,) has the shape (2,)"),
        ({"mean": None}, "mean or var is None"),
        ({"momentum": None}, "needs a count"),
        ({"feature_axes": (1, 2)}, "a size for each of the feature axes (1, 2), got (3,)"),
        ({"kind": "GroupNorm"}, "needs num_groups"),
    ):
        with refuses(told):
            dataclasses.replace(NORM, **options)


def test_eps_of_rms_norm():
    """PyTorch's None is the epsilon of the dtype that it computes in, float32 for bfloat16."""
    x = torch.tensor([[1e-4, 2e-4]])
    for dtype in (torch.float32, torch.bfloat16):
        module = torch.nn.RMSNorm(2, dtype=dtype)
        y = convert.of_torch(module).to_nnx()(jnp.asarray(x.to(dtype).float().numpy()))
        np.testing.assert_allclose(y, module(x.to(dtype)).detach().float().numpy(), rtol=float(torch.finfo(dtype).eps) * 4)
    assert convert.of_torch(torch.nn.RMSNorm(2, dtype=torch.float64)).epsilon == np.finfo(np.float64).eps

"""Every tool on a network of 50 layers, in Linen and NNX: no compilation for each layer, and what it is given stays as it is."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jnorm.linen as jnn
import jnorm.nnx as jnx
from jnorm import tools
from jnorm.tools import convert
from refusals import refuses

DEPTH, WIDTH = 50, 4
BATCHES = [np.random.default_rng(i).normal(size=(6, WIDTH)).astype(np.float32) for i in range(2)]
FEATURES = {"count": np.full(WIDTH, 9.0), "mean": np.arange(WIDTH) * 1.0, "var": np.full(WIDTH, 4.0)}


class LinenMLP(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x, train=False):
        x = jnn.FeatureStandardization(name="inputs")(x)
        for i in range(self.depth):
            x = nn.relu(jnn.BatchNorm(use_running_average=not train, name=f"norm_{i}")(nn.Dense(WIDTH, name=f"dense_{i}")(x)))
        return x


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(WIDTH, WIDTH, rngs=rngs), jnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x)))


class NNXMLP(nnx.Module):
    def __init__(self, depth):
        self.inputs = jnx.FeatureStandardization(WIDTH)
        self.blocks = nnx.List([NNXBlock(nnx.Rngs(i)) for i in range(depth)])

    def __call__(self, x):
        x = self.inputs(x)
        for block in self.blocks:
            x = block(x)
        return x


def trained(path, leaf):
    """Statistics that are not the initial ones, so that the norms do something."""
    name = jax.tree_util.keystr(path)
    return leaf + 0.1 if "mean" in name else leaf * 1.5 if "var" in name else leaf


class Linen:
    """What the tools are given: variables, or the collection that they work on."""

    def __init__(self, depth):
        self.depth, self.model = depth, LinenMLP(depth)
        self.given = jax.tree_util.tree_map_with_path(trained, self.model.init(jax.random.key(0), BATCHES[0]))
        self.stats, self.params = self.given["batch_stats"], self.given["params"]

    def copied(self):
        return self.stats

    def step(self, stats, x):
        return self.model.apply({"params": self.params, "batch_stats": stats}, x, True, mutable=["batch_stats"])[1]["batch_stats"]

    def loss(self, stats, x):
        return self.model.apply({"params": self.params, "batch_stats": stats}, x).mean()

    def output(self):
        return self.model.apply(self.given, BATCHES[0])

    def fold(self, layers=None):
        folded = tools.fold(self.model, self.given, BATCHES[0], layers=layers)
        return folded.apply(BATCHES[0]), folded.report

    def by_torch(self, layers=("dense_*", "norm_*")):
        tensors = convert.to_torch_linen(self.model, self.given, BATCHES[0], layers=layers)
        return convert.load_linen(self.model, self.given, tensors, BATCHES[0], layers=layers), len(tensors)

    @staticmethod
    def leaves(tree):
        return jax.tree.map(np.array, tree)


class NNX:
    def __init__(self, depth):
        self.depth, self.given = depth, NNXMLP(depth)
        nnx.update(self.given, jax.tree_util.tree_map_with_path(trained, nnx.state(self.given)))
        self.stats = self.params = self.given

    def copied(self):
        """`recalibrate` sets the statistics of the model that it is given."""
        return nnx.clone(self.given)

    def step(self, model, x):
        model(x)

    def loss(self, model, x):
        return model(x).mean()

    def output(self):
        return nnx.view(self.given, use_running_average=True)(BATCHES[0])

    def fold(self, layers=None):
        folded, report = tools.fold(nnx.view(self.given, use_running_average=True), BATCHES[0], layers=layers)
        return folded(BATCHES[0]), report

    def by_torch(self, layers="blocks"):
        tensors = convert.to_torch(self.given, layers=layers)
        return convert.load(self.given, tensors, layers=layers), len(tensors)

    @staticmethod
    def leaves(model):
        return nnx.split(model)[0], nnx.to_pure_dict(jax.tree.map(np.array, nnx.state(model)))


APIS = {"linen": Linen, "nnx": NNX}


@functools.cache
def network(api, depth):
    return APIS[api](depth)


def means_of(stats):
    """Of the norms, by path; the input's statistics are those of all data, which no tool but its own moves."""
    tree = nnx.to_pure_dict(nnx.state(stats, nnx.BatchStat)) if isinstance(stats, nnx.Module) else stats
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {path: leaf for path, leaf in flat.items() if path.endswith("norm/mean") or path.startswith("norm_") and path.endswith("mean")}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def recalibrate(net):
    new = tools.recalibrate(net.step, net.copied(), BATCHES)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), means_of(new), means_of(net.stats))
    assert list(moved.values()) == [True] * net.depth


def freeze_and_thaw(net):
    frozen = tools.freeze(net.given)
    marks = [p for p, _ in jax.tree_util.tree_leaves_with_path(net.leaves(frozen)) if "frozen" in jax.tree_util.keystr(p)]
    assert len(marks) == 2 * net.depth
    equal(net.leaves(tools.thaw(frozen)), net.leaves(net.given))


def blend(net):
    new = tools.blend_statistics(net.stats, net.stats, source_count=3, count=1)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), means_of(new), means_of(net.stats))


def masks(net):
    mask = tools.norm_param_mask(net.params)
    assert sum(jax.tree.leaves(mask)) == 2 * net.depth
    assert sum(jax.tree.leaves(tools.frozen_param_mask(net.params, "*0*"))) >= 2
    assert sum(jax.tree.leaves(tools.weight_decay_mask(net.params))) == net.depth


def fold(net):
    y, report = net.fold()
    assert len(report.folded) == net.depth + 1 and not report.kept  # the standardization of the inputs is folded too
    np.testing.assert_allclose(y, net.output(), rtol=1e-3, atol=1e-5)


def inspect(net):
    report = tools.inspect_norms(net.step, net.stats, BATCHES)
    assert len(report.layers) == net.depth and str(report)


def replace(net):
    new = tools.replace_norms(net.given, jnx.GroupNorm, num_groups=2)
    assert sum(isinstance(m, jnx.GroupNorm) for _, m in nnx.iter_modules(new)) == net.depth


def features(net):
    new = tools.with_feature_statistics(net.given, FEATURES)
    changed = [not np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(net.leaves(n)) for n in (new, net.given)), strict=True)]
    assert sum(changed) == len(FEATURES)


def by_torch(net):
    pytest.importorskip("torch")
    new, number = net.by_torch()
    assert number == net.depth * (2 + 5)  # PyTorch counts batches too
    equal(net.leaves(new), net.leaves(net.given))


TOOLS = {f.__name__: f for f in (recalibrate, freeze_and_thaw, blend, masks, fold, inspect, replace, features, by_torch)}
# A Linen model's modules are made by its code: nothing can be put in their place.
NNX_ONLY = {"replace", "replace_norms"}


def each(names):
    return [(name, api) for name in names for api in APIS if api == "nnx" or name not in NNX_ONLY]


@pytest.mark.parametrize("tool, api", each(TOOLS))
def test_fifty_layers(tool, api, compilations):
    """What two layers compiled is enough for fifty, but for a program of the whole model, or one beside it."""
    TOOLS[tool](network(api, 2))
    deep = network(api, DEPTH)
    before = deep.leaves(deep.given)
    with compilations() as count:
        TOOLS[tool](deep)
    assert count() <= 2
    equal(deep.leaves(deep.given), before)


def layer_by_layer(net):
    new = tools.recalibrate(jax.jit(net.step) if isinstance(net, Linen) else nnx.jit(net.step), net.copied(), BATCHES, layer_by_layer=True)
    assert all((a != b).any() for a, b in zip(means_of(new).values(), means_of(net.stats).values(), strict=True))


def sensitivity(net):
    report = tools.inspect_norms(net.step, net.stats, BATCHES, loss=net.loss)
    assert all(np.isfinite(layer.loss_alone) for layer in report.layers)


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("tool", [layer_by_layer, sensitivity], ids=lambda f: f.__name__)
def test_many_passes_over_fifty_layers(tool, api, compilations):
    """As many as there are layers: of a few programs."""
    deep = network(api, DEPTH)
    before = deep.leaves(deep.given)
    tool(network(api, 2))
    with compilations() as count:
        tool(deep)
    assert count() <= 4
    equal(deep.leaves(deep.given), before)


WITH_LAYERS = {
    "recalibrate": lambda net, layers: tools.recalibrate(net.step, net.copied(), BATCHES, layers=layers),
    "freeze": lambda net, layers: tools.freeze(net.given, layers),
    "thaw": lambda net, layers: tools.thaw(net.given, layers),
    "blend_statistics": lambda net, layers: tools.blend_statistics(net.stats, net.stats, source_count=1, count=1, layers=layers),
    "frozen_param_mask": lambda net, layers: tools.frozen_param_mask(net.params, layers),
    "fold": lambda net, layers: net.fold(layers=layers),
    "inspect_norms": lambda net, layers: tools.inspect_norms(net.step, net.stats, BATCHES, layers=layers),
    "replace_norms": lambda net, layers: tools.replace_norms(net.given, jnx.LayerNorm, layers=layers),
    "with_feature_statistics": lambda net, layers: tools.with_feature_statistics(net.given, FEATURES, layers),
    "to_torch": lambda net, layers: net.by_torch(layers),
}


@pytest.mark.parametrize("tool, api", each(WITH_LAYERS))
def test_layers_that_are_not_there(tool, api):
    """Every tool lists what there is."""
    net = network(api, 2)
    there = "inputs" if tool == "with_feature_statistics" else {"linen": "norm_1", "nnx": "blocks/1/norm"}[api]
    with refuses("'nowhere/*'", there):
        WITH_LAYERS[tool](net, "nowhere/*")

"""Other norms in place of those of an NNX model: the values kept, the places, the options carried over, and refusals."""

import types

import flax.linen as nn
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
from jnorm.tools._layers import NORMS_NNX
from refusals import refuses


def model_of(rng, make):
    """With values as a training leaves them. Nothing is initialized, which would compile for every shape."""
    model = nnx.eval_shape(make)
    nnx.update(model, models.with_values(nnx.state(model), rng))
    return model


def resnet(norms, rng, **options):
    return model_of(rng, lambda: models.NNXResNet(norms, nnx.Rngs(0), **options))


def block(norms, rng):
    return model_of(rng, lambda: models.NNXBlock(norms, 3, 4, 2, nnx.Rngs(0), jnp.float32))


def leaves(model):
    return {jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(nnx.state(model))}


def same(one, two):
    assert one.keys() == two.keys()
    for path, a in one.items():
        np.testing.assert_array_equal(a, two[path], path)
        assert a.dtype == two[path].dtype, path


@pytest.fixture
def images(rng):
    return rng.normal(size=(6, 8, 8, 3)).astype(np.float32)


call = nnx.jit(lambda model, x: model(x))


def check_same_model(model, x, length):
    """All variables bit by bit, the same outputs in training and evaluation, the same running statistics after both."""
    before = leaves(model)
    ours = tools.replace_norms(model, "jnorm")
    same(before, leaves(model))
    same(before, leaves(ours))
    assert {type(norm) for _, norm in nnx.iter_modules(ours) if "Norm" in type(norm).__name__} == {jnx.BatchNorm}
    bound = length * jnp.finfo(x.dtype).eps
    for mode in ("train", "eval"):
        getattr(model, mode)(), getattr(ours, mode)()
        with jax.numpy_dtype_promotion("standard"):
            want, got = (np.asarray(call(m, x), np.float64) for m in (model, ours))
        assert abs(got - want).max() <= bound * abs(want).max(), mode
    stats = leaves(ours)
    for path, a in leaves(model).items():
        a = a.astype(np.float64)
        assert abs(stats[path].astype(np.float64) - a).max() <= bound * abs(a).max(), path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_flax_becomes_jnorm(dtype, rng, images):
    """A ResNet-18: some 20 layers, each of which rounds its output, and sums that cancel by some more."""
    model = resnet(nnx, rng, param_dtype=dtype)
    check_same_model(model, jnp.asarray(images, dtype), 64)


def test_flax_becomes_jnorm_in_a_block(rng, images):
    model = block(nnx, rng)
    check_same_model(model, jnp.asarray(images), 16)


def test_all_variables_stay(rng):
    """Bit by bit, of a ResNet-18; the model itself too, whose classes stay."""
    model = resnet(nnx, rng, param_dtype=jnp.bfloat16)
    before = leaves(model)
    ours = tools.replace_norms(model, "jnorm")
    same(before, leaves(model))
    same(before, leaves(ours))
    assert type(model.norm) is nnx.BatchNorm and type(ours.norm) is jnx.BatchNorm
    assert nnx.graphdef(tools.replace_norms(ours, "jnorm")) == nnx.graphdef(ours)  # jnorm's own stay


def test_as_a_model_that_was_built_so(rng, images):
    """GroupNorm in place of BatchNorm."""
    model = block(jnx, rng)
    norms = types.SimpleNamespace(BatchNorm=lambda width, momentum, **options: jnx.GroupNorm(width, num_groups=2, epsilon=1e-5, **options))
    built = block(norms, rng)
    nnx.update(built, nnx.state(model, nnx.Param))
    got = tools.replace_norms(model, jnx.GroupNorm, num_groups=2)
    same(leaves(built), leaves(got))
    np.testing.assert_array_equal(call(got, images), call(built, images))
    assert nnx.graphdef(got) == nnx.graphdef(built)


def test_the_copy_trains(rng, images):
    model = block(nnx, rng)
    got = tools.replace_norms(model, jnx.GroupNorm, num_groups=2)
    before = leaves(model)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        return loss

    optimizer = nnx.Optimizer(got, optax.sgd(0.01), wrt=nnx.Param)
    first, second = step(got, optimizer, images), step(got, optimizer, images)
    assert second < first
    same(before, leaves(model))


def test_transformer(rng):
    model = model_of(rng, lambda: models.NNXTransformer(nnx, nnx.Rngs(0)))
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    ours = tools.replace_norms(model, "jnorm")
    with jax.numpy_dtype_promotion("standard"):
        difference = abs(np.asarray(call(ours, x)) - np.asarray(call(model, x))).max()
    assert difference <= 32 * np.finfo(np.float32).eps * 4
    some = tools.replace_norms(model, jnx.RMSNorm, layers="block/norm1")
    assert [type(n) for n in (some.block.norm1, some.block.norm2, some.norm)] == [jnx.RMSNorm, nnx.RMSNorm, nnx.LayerNorm]
    np.testing.assert_array_equal(some.block.norm1.scale[...], model.block.norm1.scale[...])


class Places(nnx.Module):
    """Norms wherever NNX lets them be."""

    def __init__(self, norm, shared):
        self.one, self.other = shared, shared
        self.items = nnx.List([norm(), shared])
        self.table = nnx.Dict({"key": norm()})
        self.plain = nnx.data((norm(), {"deep": [norm(), shared]}))
        self.steps = nnx.Sequential(norm(), nnx.relu)
        self.child = Child(self, norm())


class Child(nnx.Module):
    def __init__(self, parent, norm):
        self.parent, self.norm = parent, norm


class Ordinary(nnx.Module, pytree=False):
    def __init__(self, norm):
        self.items = [norm(), {"key": norm()}]


def test_places():
    rngs = nnx.Rngs(0)

    def norm():
        return nnx.BatchNorm(4, rngs=rngs)

    model = Places(norm, norm())
    got = tools.replace_norms(model, jnx.GroupNorm, num_groups=2)
    assert got.one is got.other is got.items[1] is got.plain[1]["deep"][1]
    found = {type(n).__name__ for _, n in nnx.iter_modules(got) if "Norm" in type(n).__name__}
    assert found == {"GroupNorm"} and got.child.parent is got
    places = (got.items[0], got.table["key"], got.plain[0], got.plain[1]["deep"][0], got.steps.layers[0], got.child.norm)
    assert all(type(one) is jnx.GroupNorm for one in places)
    assert type(model.plain[1]["deep"][1]) is nnx.BatchNorm and model.one is model.plain[1]["deep"][1]
    assert len(jax.tree.leaves(nnx.state(got))) == 14  # of seven norms
    other = tools.replace_norms(Ordinary(norm), jnx.InstanceNorm)
    assert all(type(n) is jnx.InstanceNorm for n in (other.items[0], other.items[1]["key"]))
    assert type(tools.replace_norms(norm(), "jnorm")) is jnx.BatchNorm  # the model itself


def test_variables_that_are_shared_stay_so():
    rngs = nnx.Rngs(0)
    model = nnx.List([nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
    model[0].scale = model[1].scale
    got = tools.replace_norms(model, jnx.GroupNorm, num_groups=2)
    assert got[0].scale is got[1].scale and got[0].scale is not model[0].scale


def test_stacked_layers(rng):
    """Of a model whose layers are made by nnx.vmap, what is new is stacked too."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(axis_size=3)
    def make(rngs):
        return nnx.BatchNorm(4, use_bias=False, momentum=0.5, rngs=rngs)

    model = make(nnx.Rngs(0))
    model.mean[...] += 2
    got = tools.replace_norms(model, jnx.BatchNorm, track_count=True, use_bias=True)
    assert got.count.shape == (3,) and got.bias.shape == got.mean.shape == (3, 4)
    run = nnx.scan(lambda x, norm: norm(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    assert run(rng.normal(size=(5, 4)).astype(np.float32), got).shape == (5, 4)


def test_metadata_and_dtypes_stay():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        norm = nnx.BatchNorm(4, scale_metadata={"out_sharding": ("model",)}, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = nnx.List([norm])
    for got in (tools.replace_norms(model, "jnorm")[0], tools.replace_norms(model, jnx.GroupNorm, num_groups=2)[0]):
        assert got.scale.get_metadata()["out_sharding"] == ("model",) and got.scale.dtype == jnp.bfloat16
        assert got.param_dtype == jnp.bfloat16
    wide = tools.replace_norms(model, jnx.GroupNorm, num_groups=2, param_dtype=jnp.float32)[0]
    assert wide.scale.dtype == wide.bias.dtype == jnp.float32 and wide.scale.get_metadata()["out_sharding"] == ("model",)


def shapes(module):
    """By path; with nothing in it that is not abstract."""
    found = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(module))}
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in found.values()), found
    return {path: (a.shape, a.dtype) for path, a in found.items()}


ABSTRACT = {
    (nnx.BatchNorm, jnx.BatchRenorm): {},
    (jnx.BatchRenorm, jnx.BatchNorm): {"track_count": True},
    (nnx.BatchNorm, jnx.CrossMiniBatchNorm): {"num_mini_batches": 2},
    (nnx.BatchNorm, jnx.GroupNorm): {"num_groups": 2, "param_dtype": jnp.float16},
    (nnx.LayerNorm, jnx.GhostBatchNorm): {"group_size": 2},
    (jnx.BatchNorm, jnx.MeanOnlyBatchNorm): {},
}


@pytest.mark.parametrize("old, like", ABSTRACT, ids=lambda kind: kind.__name__)
def test_abstract_norms(old, like):
    """They become what an instance of the class is in `nnx.eval_shape`."""
    options = ABSTRACT[old, like]
    norm = nnx.eval_shape(lambda: old(4, rngs=nnx.Rngs(0)))
    want = shapes(nnx.eval_shape(lambda: like(4, rngs=nnx.Rngs(0), **options)))
    assert shapes(tools.norm_like(norm, like, **options)) == want
    model = tools.replace_norms(nnx.eval_shape(lambda: nnx.Sequential(old(4, rngs=nnx.Rngs(0)))), like, **options)
    assert shapes(model.layers[0]) == want


def test_abstract_models():
    """Stacked layers, metadata, and what takes a checkpoint of the old class."""
    model = nnx.eval_shape(lambda: nnx.vmap(lambda rngs: nnx.LayerNorm(4, rngs=rngs))(nnx.Rngs(0).split(3)))
    new = tools.norm_like(model, jnx.BatchNorm)
    assert shapes(new)["scale",] == shapes(new)["mean",] == ((3, 4), jnp.float32)
    metadata = {"scale_metadata": {"note": "kept"}, "param_dtype": jnp.bfloat16}
    norm = nnx.eval_shape(lambda: nnx.BatchNorm(4, **metadata, rngs=nnx.Rngs(0)))
    wide = tools.norm_like(norm, jnx.GroupNorm, num_groups=2, param_dtype=jnp.float32)
    assert wide.scale.note == "kept" and shapes(wide)["scale",] == ((4,), jnp.float32)
    ours = tools.replace_norms(nnx.eval_shape(lambda: nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))), "jnorm")
    values = nnx.state(nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0))))
    nnx.update(ours, values)
    assert type(ours.layers[0]) is jnx.BatchNorm and ours(jnp.ones((2, 4))).shape == (2, 4)


OLD = {
    "epsilon": 1e-3,
    "momentum": 0.8,
    "axis": 1,
    "dtype": jnp.float32,
    "axis_name": "batch",
    "use_bias": False,
    "use_running_average": True,
}
KEPT = {
    jnx.BatchNorm: {"epsilon": 1e-3, "momentum": 0.8, "axis": 1, "axis_name": "batch", "use_running_average": True, "bias": None},
    jnx.GhostBatchNorm: {"epsilon": 1e-3, "momentum": 0.8, "feature_axes": 1, "axis_name": "batch", "group_size": 2},
    jnx.BatchRenorm: {"epsilon": 1e-3, "momentum": 0.8, "feature_axes": 1, "use_running_average": True},
    jnx.GroupNorm: {"epsilon": 1e-3, "feature_axes": 1, "axis_name": None, "num_groups": 2, "bias": None, "reduction_axes": None},
    jnx.InstanceNorm: {"epsilon": 1e-3, "feature_axes": 1, "dtype": jnp.float32, "reduction_axes": None},
    jnx.LayerNorm: {"epsilon": 1e-3, "feature_axes": 1, "reduction_axes": 1},
    jnx.FilterResponseNorm: {"epsilon": 1e-6, "feature_axes": 1, "axis_name": None},
    jnx.RMSNorm: {"epsilon": 1e-6, "feature_axes": 1, "reduction_axes": 1},
    jnx.TrackedInstanceNorm: {"epsilon": 1e-3, "momentum": 0.8, "feature_axes": 1, "axis_name": None},
}


@pytest.mark.parametrize("like", KEPT, ids=lambda like: like.__name__)
def test_what_is_carried_over(like, rng):
    norm = model_of(rng, lambda: nnx.BatchNorm(4, **OLD, rngs=nnx.Rngs(0)))
    options = {"num_groups": 2} if like is jnx.GroupNorm else {"group_size": 2} if like is jnx.GhostBatchNorm else {}
    new = tools.norm_like(norm, like, **options)
    assert {name: getattr(new, name) for name in KEPT[like]} == KEPT[like]
    assert new.scale is norm.scale
    batch = like in (jnx.BatchNorm, jnx.GhostBatchNorm)
    if like is jnx.BatchRenorm:
        np.testing.assert_allclose(new.std[...], np.sqrt(np.asarray(norm.var[...], np.float64) + 1e-3), rtol=1e-6)
        back = tools.norm_like(new, jnx.BatchNorm)
        np.testing.assert_allclose(back.var[...], norm.var[...], rtol=1e-6)
    elif hasattr(new, "var"):
        assert (new.var is norm.var) == batch
        assert batch or float(new.var[...].max()) == 1


def test_flax_group_norm_to_others():
    """It keeps neither the number of its features nor the name that the others give their axes."""
    norm = nnx.GroupNorm(8, num_groups=4, epsilon=1e-3, rngs=nnx.Rngs(0))
    assert tools.norm_like(norm, jnx.GroupNorm).num_groups == 4
    assert tools.norm_like(norm, jnx.GroupNorm, group_size=4).num_groups == 2
    assert tools.norm_like(norm, jnx.InstanceNorm).num_features == 8


def test_a_new_count_is_that_of_many_batches(rng):
    """Statistics that are carried over stay a part of the average, as without a count."""
    norm = model_of(rng, lambda: nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0)))
    plain, counted = tools.norm_like(nnx.clone(norm), jnx.BatchNorm), tools.norm_like(nnx.clone(norm), jnx.BatchNorm, track_count=True)
    x = rng.normal(size=(7, 3)).astype(np.float32)
    plain(x), counted(x)
    np.testing.assert_allclose(counted.mean[...], plain.mean[...], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(counted.var[...], plain.var[...], rtol=1e-5)


def test_rules():
    rngs = nnx.Rngs(0)
    model = nnx.List([nnx.BatchNorm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)])
    paths = []

    def rule(path, norm):
        paths.append(path)
        if isinstance(norm, nnx.BatchNorm):
            return nnx.Sequential(tools.norm_like(norm, jnx.FilterResponseNorm), jnx.ThresholdedLinearUnit(norm.num_features, rngs=rngs))
        return None

    got = tools.replace_norms(model, rule)
    assert paths == ["0", "1", "2"] and [type(n) for n in got] == [nnx.Sequential, nnx.LayerNorm, nnx.Sequential]
    assert got[2](jnp.ones((1, 2, 2, 6))).shape == (1, 2, 2, 6)
    without = tools.replace_norms(model, lambda path, norm: lambda x: x, layers=["1"])
    assert without[1](3) == 3


class Mine(nnx.Module):
    def __init__(self, num_features, *, epsilon=1e-3, rngs):
        self.scale, self.epsilon = nnx.Param(jnp.ones(num_features)), epsilon


class Derived(nnx.BatchNorm):
    pass


def test_classes_of_ones_own(rng):
    norm = model_of(rng, lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    new = tools.norm_like(norm, Mine)
    assert new.scale is norm.scale and new.epsilon == 1e-3
    model = nnx.List([Derived(4, rngs=nnx.Rngs(0))])
    assert type(tools.replace_norms(model, "jnorm")[0]) is Derived
    assert type(tools.replace_norms(model, jnx.BatchNorm)[0]) is jnx.BatchNorm


def test_refusals():
    rngs = nnx.Rngs(0)
    model = nnx.Dict({"a": nnx.Dict({"norm": nnx.BatchNorm(4, rngs=rngs)}), "b": jnx.BatchNorm(6, activation="relu", rngs=rngs)})
    with refuses("no norm in the model"):
        tools.replace_norms(nnx.List([nnx.Linear(2, 2, rngs=rngs)]), "jnorm")
    with refuses("layers='c'", "'a/norm', 'b'"):
        tools.replace_norms(model, "jnorm", layers="c")
    with refuses("the norm at 'a/norm'", "num_groups=3", "4 channels"):
        tools.replace_norms(model, jnx.GroupNorm, num_groups=3)
    with refuses("the norm at 'b'", "activation='relu'", "LayerNorm"):
        tools.replace_norms(model, jnx.LayerNorm, layers="b")
    with refuses("the norm at 'a/norm'", "num_gropus", kind=TypeError):
        tools.replace_norms(model, jnx.GroupNorm, num_gropus=3)
    with refuses("'a/norm'", "the rule must return a module", "int", kind=TypeError):
        tools.replace_norms(model, lambda path, norm: 3)
    with refuses("rule must be a class, 'jnorm', or a function", "'flax'", kind=TypeError):
        tools.replace_norms(model, "flax")
    with refuses("num_groups", "a function", kind=TypeError):
        tools.replace_norms(model, lambda path, norm: None, num_groups=3)
    with refuses("SpectralNorm does not take num_features"):
        tools.replace_norms(model, jnx.SpectralNorm)
    with refuses("AddRMSNorm is called otherwise than GroupNorm"):
        tools.norm_like(jnx.AddRMSNorm(4, rngs=rngs), jnx.GroupNorm)
    with refuses("one channel axis", "(1, 2)"):
        tools.norm_like(jnx.BatchNorm(4, axis=(1, 2), rngs=rngs), jnx.GroupNorm)


CLASSES = {norm for norm in NORMS_NNX if not norm.__name__.startswith(("Add", "CrossIter", "Divisive"))}
ASKED = {"GroupNorm": {"num_groups": 2}, "GhostBatchNorm": {"group_size": 2}, "CrossMiniBatchNorm": {"num_mini_batches": 2}}


def variables_of(norm):
    return {name: v.shape for name, v in vars(norm).items() if isinstance(v, nnx.Variable)}


def native(norm):
    return norm(4, **ASKED.get(norm.__name__, {}), rngs=nnx.Rngs(0))


def test_variables_are_those_of_the_class():
    """Between all classes: what the new one does not have would be trained, saved and refused by its checkpoints."""
    made = {norm: native(norm) for norm in CLASSES}
    for old in CLASSES:
        for new in CLASSES:
            got = tools.norm_like(made[old], new, **ASKED.get(new.__name__, {}))
            assert variables_of(got) == variables_of(made[new]), (old, new)
    only = tools.norm_like(made[jnx.BatchNorm], jnx.MeanOnlyBatchNorm)
    assert only(jnp.ones((2, 4))).shape == (2, 4)
    frozen = tools.freeze(nnx.List([jnx.BatchNorm(4, track_count=True, rngs=nnx.Rngs(0))]))[0]
    kept = tools.norm_like(frozen, jnx.BatchRenorm)
    assert {"frozen_statistics", "frozen_updates", "count", "std"} <= set(variables_of(kept))
    assert set(variables_of(tools.norm_like(frozen, nnx.BatchNorm))) == {"scale", "bias", "mean", "var"}


class Synced(jnx.BatchNorm):
    """As one derives from a norm."""


def test_derived_classes_are_those_that_they_derive_from(rng):
    old = model_of(rng, lambda: Synced(4, axis=1, epsilon=1e-2, rngs=nnx.Rngs(0)))
    for like in (jnx.BatchNorm, Synced):
        new = tools.norm_like(old, like)
        assert (new.axis, new.epsilon, new.mean is old.mean, new.var is old.var) == (1, 1e-2, True, True)
    ghost = tools.norm_like(old, jnx.GhostBatchNorm, group_size=2)
    assert (ghost.feature_axes, ghost.mean is old.mean) == (1, True)


def test_linen_and_unused_options_are_refused():
    model = nnx.List([jnx.BatchNorm(4, rngs=nnx.Rngs(0))])
    with refuses("model must be an NNX module, got BatchNorm, which is Linen's", kind=TypeError):
        tools.replace_norms(nn.BatchNorm(), "jnorm")
    with refuses("one of NNX, got LayerNorm, which is Linen's", kind=TypeError):
        tools.replace_norms(model, jnn.LayerNorm)
    with refuses("the rule must return a module", "BatchNorm, which is Linen's", kind=TypeError):
        tools.replace_norms(model, lambda path, norm: nn.BatchNorm())
    with refuses("['epsilon'] are not used"):
        tools.replace_norms(model, "jnorm", epsilon=3.0)
    with refuses("LayerNorm is called otherwise than AddLayerNorm"):
        tools.norm_like(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), jnx.AddLayerNorm)
    with refuses("a norm of jnorm.nnx or flax.nnx, got Linear", kind=TypeError):
        tools.norm_like(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnx.LayerNorm)

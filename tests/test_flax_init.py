"""Initialized from the same key, a model has the variables that it has with Flax's classes: paths, types, shapes, dtypes and values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm.linen
import jnorm.nnx
from flax_grid import MODULES, NORMS, lenient

X = np.ones((2, 3, 6), np.float32)
normal = nn.initializers.normal(1.0)
RANDOM = [{"scale_init": normal, "bias_init": normal}, {"scale_init": normal, "use_bias": False, "param_dtype": jnp.bfloat16}]


def options_of(name, options):
    groups = {"num_groups": 3} if name == "GroupNorm" else {}
    running = {"use_running_average": False} if name == "BatchNorm" else {}
    without_bias = {k: v for k, v in options.items() if name != "RMSNorm" or "bias" not in k}
    return without_bias | groups | running


def same(ours, theirs):
    ours, theirs = (dict(jax.tree_util.tree_leaves_with_path(t)) for t in (ours, theirs))
    assert list(ours) == list(theirs)
    for path, leaf in ours.items():
        assert (leaf.dtype, leaf.shape) == (theirs[path].dtype, theirs[path].shape), path
        np.testing.assert_array_equal(leaf, theirs[path], str(path))


class Model(nn.Module):
    """A layer before and one after what is initialized."""

    middle: nn.Module

    @nn.compact
    def __call__(self, x, **kwargs):
        return nn.Dense(4)(self.middle(nn.Dense(6)(x), **kwargs))


def linen_init(middle, **kwargs):
    with lenient():
        return Model(middle).init(jax.random.key(3), X, **kwargs)


@pytest.mark.parametrize("options", RANDOM)
@pytest.mark.parametrize("name", NORMS)
def test_linen(name, options):
    theirs, ours = (linen_init(getattr(m, name)(**options_of(name, options))) for m in MODULES["linen"])
    same(ours, theirs)


@pytest.mark.parametrize("axes", [1, (-1, 1), (2, -1)])
def test_linen_feature_axes(axes):
    shared = {"use_running_average": False, "scale_init": normal, "bias_init": normal}
    theirs, ours = (linen_init(m.BatchNorm(axis=axes, **shared)) for m in MODULES["linen"])
    same(ours, theirs)


def test_narrow_running_statistics_are_kept_in_float32():
    """Flax's are of param_dtype there."""
    options = {"use_running_average": False, "force_float32_reductions": False, "param_dtype": jnp.bfloat16}
    theirs, ours = (linen_init(m.BatchNorm(**options)) for m in MODULES["linen"])
    same(ours["params"], theirs["params"])
    for key in ("mean", "var"):
        assert theirs["batch_stats"]["middle"][key].dtype == jnp.bfloat16
        assert ours["batch_stats"]["middle"][key].dtype == jnp.float32


def without_kernel(tree):
    """Of the wrapped layer, whose kernel differs, only where it is and of what shape."""

    def empty(path, leaf):
        return jnp.zeros_like(leaf) if jax.tree_util.keystr(path, simple=True, separator="/").endswith("layer_instance/kernel") else leaf

    return jax.tree_util.tree_map_with_path(empty, tree)


@pytest.mark.parametrize("options", [{}, {"scale_init": normal}, {"use_scale": False}, {"feature_axes": None, "variable_filter": None}])
def test_linen_weight_norm(options):
    """The same, but for the kernel: ours is the layer's own, Flax's what that is normalized to."""
    theirs, ours = (linen_init(m.WeightNorm(nn.Dense(6), **options)) for m in MODULES["linen"])
    kernel, stored = (v["params"]["middle"]["layer_instance"]["kernel"] for v in (ours, theirs))
    scale = ours["params"]["middle"].get("layer_instance/kernel/scale", np.ones(()))
    kernel = np.asarray(kernel, np.float64)
    axes = (0, 1) if "feature_axes" in options else 0
    want = np.asarray(scale, np.float64) * kernel / np.sqrt((kernel**2).sum(axes))
    # a sum of up to 36 terms and a few operations
    np.testing.assert_allclose(stored, want, rtol=(36 + 16) * 2**-23)
    assert abs(kernel - want).max() > 0.1
    same(without_kernel(ours), without_kernel(theirs))


def test_linen_spectral_norm():
    """With update_stats=False the same, but for the kernel; with True, Flax takes a step in initialization, ours does not."""
    theirs, ours = (linen_init(m.SpectralNorm(nn.Dense(6)), update_stats=False) for m in MODULES["linen"])
    same(without_kernel(ours), without_kernel(theirs))
    stepped, not_stepped = (linen_init(m.SpectralNorm(nn.Dense(6)), update_stats=True) for m in MODULES["linen"])
    same(not_stepped, ours)
    assert float(stepped["batch_stats"]["middle"]["layer_instance/kernel/sigma"]) != 1


def nnx_state(make):
    """-> the state of a layer before, the one made, and one after, from one stream; and what it draws next."""
    rngs = nnx.Rngs(3)
    with lenient():
        model = [nnx.Linear(6, 6, rngs=rngs), make(rngs), nnx.Linear(6, 4, rngs=rngs)]
    return [dict(nnx.to_flat_state(nnx.state(m))) for m in model], rngs.params()


def same_nnx(ours, theirs):
    for one, two in zip(ours[0], theirs[0], strict=True):
        assert list(one) == list(two)
        for path, variable in one.items():
            other = two[path]
            assert type(variable) is type(other) and variable.get_metadata() == other.get_metadata(), path
            assert (variable.dtype, variable.shape) == (other.dtype, other.shape), path
            np.testing.assert_array_equal(variable[...], other[...], str(path))
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("options", [*RANDOM, {"scale_metadata": {"tag": "gain"}}])
@pytest.mark.parametrize("name", NORMS)
def test_nnx(name, options):
    def make(module):
        return nnx_state(lambda rngs: getattr(module, name)(6, rngs=rngs, **options_of(name, options)))

    theirs, ours = map(make, MODULES["nnx"])
    same_nnx(ours, theirs)


@pytest.mark.parametrize("layer", [lambda rngs: nnx.Linear(6, 6, rngs=rngs), lambda rngs: nnx.Conv(6, 6, (3,), rngs=rngs)])
def test_nnx_spectral_norm(layer):
    theirs, ours = (nnx_state(lambda rngs, m=m: m.SpectralNorm(layer(rngs), rngs=rngs)) for m in MODULES["nnx"])
    same_nnx(ours, theirs)


def test_nnx_weight_norm():
    """Flax's scales are arrays, ours Params of the same path, shape and value; all else is the same."""

    def make(module):
        return nnx_state(lambda rngs: module.WeightNorm(nnx.Linear(6, 6, rngs=rngs), rngs=rngs))

    theirs, ours = map(make, MODULES["nnx"])
    path = ("scales", ("kernel",))
    mine, flax = ours[0][1].pop(path), theirs[0][1].pop(path)
    assert type(mine) is nnx.Param and not isinstance(flax, nnx.Variable)
    np.testing.assert_array_equal(mine[...], flax)
    same_nnx(ours, theirs)


def test_nnx_weight_norm_with_random_scales():
    """The layers after it start as they do behind Flax's, whose own scales must not be random: it gives the initializer no key."""

    def make(module, **options):
        return nnx_state(lambda rngs: module.WeightNorm(nnx.Linear(6, 6, rngs=rngs), rngs=rngs, **options))

    theirs, ours = make(nnx), make(jnorm.nnx, scale_init=normal)
    scale = ours[0][1].pop(("scales", ("kernel",)))[...]
    assert len(set(np.asarray(scale).tolist())) == 6
    theirs[0][1].pop(("scales", ("kernel",)))
    same_nnx(ours, theirs)
    again = make(jnorm.nnx, scale_init=normal)[0][1][("scales", ("kernel",))]
    np.testing.assert_array_equal(again[...], scale)
    with pytest.raises(TypeError):
        make(nnx, scale_init=normal)

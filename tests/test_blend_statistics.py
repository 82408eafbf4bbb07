"""Statistics of training blended with those of another domain: the linear rule, its limits, and what is refused."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jnorm
import jnorm.nnx as jnx
from jnorm import tools
from refusals import refuses

FEATURES = 3


@pytest.fixture
def two(rng):
    """Source and target, as numbers and as trees: all kinds of state."""
    kinds = {"batch": ("mean", "var"), "renorm": ("mean", "std"), "only": ("mean",)}

    def drawn():
        return {name: {key: rng.uniform(0.5, 2, FEATURES).astype(np.float32) for key in keys} for name, keys in kinds.items()}

    return {"norms": drawn(), "other": np.float32(7)}, {"norms": drawn(), "other": np.float32(8)}


def want(source, target, share):
    """In float64."""
    a, b = np.float64(source), np.float64(target)
    return share * a + (1 - share) * b


@pytest.mark.parametrize("jit", [False, True], ids=["plain", "jit"])
def test_the_linear_rule(jit, two):
    source, target = two
    blend = tools.blend_statistics
    new = (
        jax.jit(lambda s, t, n, m: blend(s, t, source_count=n, count=m)) if jit else lambda s, t, n, m: blend(s, t, source_count=n, count=m)
    )(source, target, 16.0, 48.0)
    assert float(new["other"]) == 7
    for name, state in source["norms"].items():
        for key, a in state.items():
            power = 2 if key == "std" else 1
            value = want(np.float64(a) ** power, np.float64(target["norms"][name][key]) ** power, 0.25) ** (1 / power)
            np.testing.assert_allclose(new["norms"][name][key], value, rtol=8 * 1.2e-7, err_msg=f"{name} {key}")


@pytest.mark.parametrize(("number", "index"), [(0, 1), (float("inf"), 0)])
def test_all_or_nothing(number, index, two):
    """N = 0 is the target, infinity the source, bit for bit but for the root of a square."""
    new = tools.blend_statistics(*two, source_count=number, count=8)["norms"]
    for name, state in two[index]["norms"].items():
        for key, a in state.items():
            np.testing.assert_allclose(new[name][key], a, rtol=1.2e-7 if key == "std" else 0)


@pytest.mark.parametrize(("adapt", "moves"), [("mean", {"mean"}), ("var", {"var", "std"})])
def test_one_of_the_two(adapt, moves, two):
    new = tools.blend_statistics(*two, source_count=8, count=8, adapt=adapt)["norms"]
    both = tools.blend_statistics(*two, source_count=8, count=8)["norms"]
    for name, state in new.items():
        for key, a in state.items():
            np.testing.assert_array_equal(a, (both if key in moves else two[0]["norms"])[name][key])


def test_some_layers(two):
    new = tools.blend_statistics(*two, source_count=8, count=8, layers="norms/re*")["norms"]
    for name in ("batch", "only"):
        jax.tree.map(np.testing.assert_array_equal, new[name], two[0]["norms"][name])
    assert (new["renorm"]["std"] != two[0]["norms"]["renorm"]["std"]).all()


def test_as_the_paper_has_it(rng):
    """A few samples of a shifted domain: their unbiased variance, and the rest of the state is the source's. In bfloat16 too."""
    x = (rng.normal(size=(8, FEATURES)) * 3 + 5).astype(np.float32)
    for dtype, error in ((jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)):
        source = {**jnorm.batch_norm_state(FEATURES, track_count=True, dtype=dtype), "count": jnp.float32(9)}
        target = tools.recalibrate(lambda s, x: jnorm.batch_norm(x, s)[1], source, [x], estimator="mean")
        new = tools.blend_statistics(source, target, source_count=24, count=len(x))
        wide = x.astype(np.float64)
        np.testing.assert_allclose(np.float64(new["mean"]), wide.mean(0) / 4, rtol=2 * error)
        np.testing.assert_allclose(np.float64(new["var"]), 0.75 + wide.var(0, ddof=1) / 4, rtol=2 * error)
        assert float(new["count"]) == 9 and new["mean"].dtype == dtype


def test_nnx(rng):
    """A copy, in which the source's norms have the blend."""
    source = jnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))
    x = rng.normal(size=(4, FEATURES)).astype(np.float32)
    target = tools.recalibrate(lambda m, x: m(x), nnx.clone(source), [x], estimator="mean")
    new = tools.blend_statistics(source, target, source_count=4, count=4)
    assert isinstance(new, jnx.BatchNorm) and source.mean[...].tolist() == [0] * FEATURES
    np.testing.assert_allclose(new.mean[...], np.float64(x).mean(0) / 2, rtol=1e-6)
    np.testing.assert_allclose(new.var[...], 0.5 + np.float64(x).var(0, ddof=1) / 2, rtol=1e-6)
    with refuses("NNX model", "dict"):
        tools.blend_statistics(source, {}, source_count=4, count=4)


def test_frozen_dict(two):
    new = tools.blend_statistics(flax.core.freeze(two[0]), two[1], source_count=1, count=1)
    assert isinstance(new, flax.core.FrozenDict)
    jax.tree.map(np.testing.assert_array_equal, flax.core.unfreeze(new), tools.blend_statistics(*two, source_count=1, count=1))


def test_refused(two):
    blend = functools.partial(tools.blend_statistics, *two)
    for options, fragments in (
        ({"source_count": -1, "count": 1}, ["source_count is a number of samples, at least 0, got -1."]),
        ({"source_count": float("nan"), "count": 1}, ["source_count", "nan"]),
        ({"source_count": "3", "count": 1}, ["source_count", "'3'"]),
        ({"source_count": float("inf"), "count": float("inf")}, ["count must be finite", "inf"]),
        ({"source_count": 1, "count": 0}, ["count is a number of samples, at least 1, got 0."]),
        ({"source_count": 1, "count": 1, "adapt": "std"}, ["adapt", "'std'"]),
        ({"source_count": 1, "count": 1, "layers": "head"}, ["layers='head'", "'norms/batch', 'norms/only', 'norms/renorm'"]),
        ({"source_count": np.ones(2), "count": 1}, ["source_count"]),
    ):
        with refuses(*fragments):
            blend(**options)
    source, target = ({"a": jnorm.batch_norm_state(n)} for n in (3, 4))
    with refuses("'a'", "(3,)", "(4,)"):
        tools.blend_statistics(source, target, source_count=1, count=1)
    with refuses("source alone has ['a']", "target alone ['b']"):
        tools.blend_statistics(source, {"b": target["a"]}, source_count=1, count=1)
    with refuses("no running statistics"):
        tools.blend_statistics({"w": np.ones(3)}, {"w": np.ones(3)}, source_count=1, count=1)

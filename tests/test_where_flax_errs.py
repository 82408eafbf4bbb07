"""Inputs on which Flax's classes are wrong and jnorm's, in Linen and in NNX, are right: both claims of the docs are held."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jnorm.linen
import jnorm.nnx
import oracles
from flax_grid import jit, lenient

APIS = ["linen", "nnx"]
JNORM, FLAX = {"linen": jnorm.linen, "nnx": jnorm.nnx}, {"linen": flax.linen, "nnx": nnx}


def run(module, name, x, mask=None, **options):
    """-> y, and the updated statistics, of a fresh layer."""
    return jit(lambda x, mask: traced(module, name, x, mask, **options))(x, mask)


def traced(module, name, x, mask, **options):
    f = linen_layer if module in (flax.linen, jnorm.linen) else nnx_layer
    options = ({"use_running_average": False, "momentum": 0.0} if name == "BatchNorm" else {}) | options
    return f(getattr(module, name), x, mask, **options)


def linen_layer(cls, x, mask, **options):
    layer = cls(**options)
    variables = layer.init(jax.random.key(0), x)
    y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, dict(updates.get("batch_stats", {}))


def nnx_layer(cls, x, mask, **options):
    layer = cls(x.shape[-1], rngs=nnx.Rngs(0), **options)
    return layer(x, mask=mask), {k: getattr(layer, k)[...] for k in ("mean", "var") if hasattr(layer, k)}


def both(api, *args, **options):
    """-> ours and Flax's."""
    ours = run(JNORM[api], *args, **options)
    with lenient():
        return ours, run(FLAX[api], *args, **options)


def check(got, x, kept, **options):
    """y against float64, without scale and bias."""
    ids = oracles.sets(x.shape, kept)
    answer = oracles.norm(x, ids, oracles.Affine((), None, None), np.zeros(x.shape), **options)
    oracles.assert_close(got, answer.y, int(answer.moments.count.max()))
    return answer


# --- values -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kept", "epsilon"), [("BatchNorm", {1: 1}, 1e-5), ("LayerNorm", {0: 1}, 1e-6)])
@pytest.mark.parametrize("api", APIS)
def test_a_mean_large_beside_the_deviation(api, name, kept, epsilon, rng):
    """E[x²] − E[x]² of N(0, 1) + 1e4 in float32 is off by units."""
    x = (rng.normal(size=(32, 48)) + 1e4).astype(np.float32)
    (y, stats), (flax_y, flax_stats) = both(api, name, x)
    answer = check(y, x, kept, epsilon=epsilon)
    if stats:
        oracles.assert_close(stats["var"], oracles.Bounded(answer.moments.var, answer.moments.var), 32)
        assert abs(flax_stats["var"] - answer.moments.var).max() > 0.5
    assert abs(flax_y - answer.y.value).max() > 0.5


@pytest.mark.parametrize("api", APIS)
def test_devices_that_count_differently(api):
    """One counts the value 1, one 0, 3, 8 and 10: the mean of all five is 4.4, the mean of the means 3.125."""
    x = np.array([[1, 50, 50, 50], [0, 3, 8, 10]], np.float32)[..., None]
    mask = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], bool)[..., None]

    def synchronized(module):
        shard = lambda x, mask: traced(module, "BatchNorm", x, mask, axis_name="shards")  # noqa: E731
        return jit(jax.vmap(shard, axis_name="shards"))(x, mask)

    y, stats = synchronized(JNORM[api])
    with lenient():
        _, flax_stats = synchronized(FLAX[api])
    counted = x[mask].astype(np.float64)
    for shard in range(2):
        for key, want in (("mean", counted.mean()), ("var", counted.var())):
            oracles.assert_close(stats[key][shard, 0], oracles.Bounded(want, want), 5)
    np.testing.assert_allclose(counted.mean(), 4.4)
    np.testing.assert_allclose(flax_stats["mean"], 3.125)
    answer = oracles.norm(x, np.zeros(x.shape, int), oracles.Affine((), None, None), np.zeros(x.shape), mask=mask, epsilon=1e-5)
    oracles.assert_close(y, answer.y, 5)


@pytest.mark.parametrize("api", APIS)
def test_groups_with_another_batch_axis(api, rng):
    """Flax's NNX class repeats the groups along axis 1, whatever is there: groups get each other's statistics."""
    x = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    options = {"num_groups": 4, "reduction_axes": (-2, -1)}
    y, _ = run(JNORM[api], "GroupNorm", x, **options)
    answer = check(y, x, {0: 1, 1: 1, 3: 2}, epsilon=1e-6)
    with lenient():
        wrong = abs(run(FLAX[api], "GroupNorm", x, **options)[0] - answer.y.value).max()
    assert (wrong > 0.5) == (api == "nnx")


def test_running_statistics_are_not_rounded_to_the_output():
    """With dtype=bfloat16 Flax's NNX class subtracts a mean of 10.03 as 10, 3 standard deviations away."""
    x = np.linspace(10.02, 10.04, 8, dtype=np.float32).reshape(8, 1)

    def evaluated(module):
        layer = module.BatchNorm(1, use_running_average=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        layer.mean[...], layer.var[...] = jnp.full(1, 10.03), jnp.full(1, 1e-4)
        return layer(x)

    mean, var = (np.float64(np.float32(v)) for v in (10.03, 1e-4))
    want = (x.astype(np.float64) - mean) / np.sqrt(var + 1e-5)
    y = evaluated(jnorm.nnx)
    assert y.dtype == jnp.bfloat16
    # x and the mean are exact in float32, their difference too; then a few operations, and the output's rounding.
    oracles.assert_close(y, oracles.Bounded(want, 1 + abs(want)), 1)
    with lenient():
        wrong = evaluated(nnx)
    assert abs(oracles.wide(wrong) - want).max() > 0.9


def test_batch_statistics_are_not_of_rounded_values(rng):
    """Around 10 the numbers of bfloat16 are 1/16 apart: a variance of 1e-4 is lost."""
    x = (rng.normal(size=(64, 3)) * 0.01 + 10).astype(np.float32)
    (y, stats), (_, flax_stats) = both("nnx", "BatchNorm", x, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    answer = check(y, x, {1: 1}, epsilon=1e-5)
    for key, size in (("mean", 10), ("var", answer.moments.var)):
        oracles.assert_close(stats[key], oracles.Bounded(getattr(answer.moments, key), size), 64)
    assert (abs(flax_stats["var"] - answer.moments.var) > 0.5 * answer.moments.var).all()


# --- masks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int32", "float32", "twos"])
@pytest.mark.parametrize("api", APIS)
def test_masks_of_numbers(api, kind, rng):
    """Nonzero counts. Flax's Linen classes take such masks as well; in NNX they are errors, or taken for booleans by some versions."""
    x = (rng.normal(size=(4, 3, 6)) * 1.5 + 2).astype(np.float32)
    counted = rng.uniform(size=x.shape) < 0.67
    counted[0] = True
    mask = counted.astype(np.float32) * 2 if kind == "twos" else counted.astype(kind)
    for name, kept, epsilon in (("BatchNorm", {2: 1}, 1e-5), ("GroupNorm", {0: 1, 2: 2}, 1e-6)):
        y, _ = run(JNORM[api], name, x, mask, **({"num_groups": 3} if name == "GroupNorm" else {}))
        check(y, x, kept, mask=counted, epsilon=epsilon)
    if api == "nnx":
        with lenient(), pytest.raises((TypeError, ValueError)):
            run(nnx, "BatchNorm", x, mask)


@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 1, 1), (3, 1), (6,)])
@pytest.mark.parametrize("api", APIS)
def test_masks_that_broadcast(api, shape, rng):
    """Flax's group norm reshapes the mask's last axis into groups, and so refuses one position for all channels."""
    x = (rng.normal(size=(4, 3, 6)) * 1.5 + 2).astype(np.float32)
    mask = rng.uniform(size=shape) < 0.6
    mask.flat[::2] = True
    y, _ = run(JNORM[api], "GroupNorm", x, mask, num_groups=3)
    check(y, x, {0: 1, 2: 2}, mask=np.broadcast_to(mask, x.shape), epsilon=1e-6)
    if shape[-1] == 1:
        with lenient(), pytest.raises((TypeError, ValueError), match="cannot reshape"):
            run(FLAX[api], "GroupNorm", x, mask, num_groups=3)


@pytest.mark.parametrize("how", ["all masked", "one channel", "no samples"])
@pytest.mark.parametrize("api", APIS)
def test_batches_that_count_nothing(api, how, rng):
    """The running statistics stay, and normalize; Flax's become not a number, for good."""
    shape = (0, 3) if how == "no samples" else (4, 3)
    x, mask = (rng.normal(size=shape) + 2).astype(np.float32), np.ones(shape, bool)
    mask[:, 1 if how == "one channel" else slice(None)] = False
    empty = ~mask.any(0)
    (y, stats), (flax_y, flax_stats) = both(api, "BatchNorm", x, None if how == "no samples" else mask)
    np.testing.assert_array_equal(np.asarray(stats["mean"])[empty], 0)
    np.testing.assert_array_equal(np.asarray(stats["var"])[empty], 1)
    running = (np.zeros(3), np.ones(3))
    answer = (
        oracles.norm(
            x, oracles.sets(shape, {1: 1}), oracles.Affine((), None, None), np.zeros(shape), mask=mask, epsilon=1e-5, running=running
        )
        if x.size
        else None
    )
    if answer:
        oracles.assert_close(y, answer.y, 4)
        assert np.isnan(np.asarray(flax_y)[:, empty]).all()
    assert all(np.isnan(np.asarray(flax_stats[k])[empty]).all() for k in ("mean", "var"))


# --- wrapped layers -----------------------------------------------------------------------------------------------------------


WRAPPERS = ["WeightNorm", "SpectralNorm"]


def calls(name):
    return {"update_stats": True} if name == "SpectralNorm" else {}


@pytest.mark.parametrize("name", WRAPPERS)
def test_nnx_kernels_are_not_overwritten(name, rng):
    x = rng.normal(size=(2, 4)).astype(np.float32)

    def kernels(module):
        rngs = nnx.Rngs(0)
        layer = getattr(module, name)(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)
        before = np.asarray(layer.layer_instance.kernel[...]).copy()
        for _ in range(3):
            layer(x, **calls(name))
        return before, np.asarray(layer.layer_instance.kernel[...])

    np.testing.assert_array_equal(*kernels(jnorm.nnx))
    with lenient():
        before, after = kernels(nnx)
    assert abs(before - after).max() > 0.1


@pytest.mark.parametrize("mutable", [True, ["params", "batch_stats"]], ids=str)
@pytest.mark.parametrize("name", WRAPPERS)
def test_linen_kernels_are_not_overwritten(name, mutable, rng):
    """Also where "params" may be written. Flax's SpectralNorm does then."""
    x = rng.normal(size=(2, 4)).astype(np.float32)
    kernel = {"layer_instance": {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)}}

    def after(module):
        layer = getattr(module, name)(flax.linen.Dense(3))
        variables = layer.init(jax.random.key(0), x, **calls(name))
        variables = {**variables, "params": {**variables["params"], **kernel}}
        for _ in range(2):
            _, updates = layer.apply(variables, x, **calls(name), mutable=mutable)
            variables = {**variables, **updates}
        return np.asarray(variables["params"]["layer_instance"]["kernel"])

    np.testing.assert_array_equal(after(jnorm.linen), kernel["layer_instance"]["kernel"])
    with lenient():
        moved = abs(after(flax.linen) - kernel["layer_instance"]["kernel"]).max()
    assert (moved > 0.1) == (name == "SpectralNorm")


def test_scales_are_trained(rng):
    """WeightNorm's scales are Params: filters find them, and an optimizer moves them. Flax's are arrays that nothing trains."""
    x, target = (rng.normal(size=(5, n)).astype(np.float32) for n in (4, 3))

    def trained(module):
        rngs = nnx.Rngs(0)
        layer = module.WeightNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)
        optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
        gradients = nnx.grad(lambda layer: ((layer(x) - target) ** 2).mean())(layer)
        optimizer.update(layer, gradients)
        paths = dict(nnx.to_flat_state(nnx.state(layer, nnx.Param)))
        scale = layer.scales[("kernel",)]
        return paths, np.asarray(scale[...] if isinstance(scale, nnx.Variable) else scale), gradients

    paths, scale, gradients = trained(jnorm.nnx)
    assert set(paths) == {("layer_instance", "kernel"), ("layer_instance", "bias"), ("scales", ("kernel",))}
    moved = np.float32(1) - np.float32(0.1) * np.asarray(dict(nnx.to_flat_state(gradients))[("scales", ("kernel",))][...])
    np.testing.assert_allclose(scale, moved, rtol=2**-22)
    assert abs(scale - 1).min() > 1e-3
    with lenient():
        paths, scale, _ = trained(nnx)
    assert ("scales", ("kernel",)) not in paths
    np.testing.assert_array_equal(scale, 1)

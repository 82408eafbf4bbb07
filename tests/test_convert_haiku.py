"""Haiku's norms: outputs in training and evaluation and running statistics are Haiku's own, there and back, for several steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jnorm.tools import convert
from refusals import refuses

hk = pytest.importorskip("haiku", reason="dm-haiku is an optional test dependency")

SHAPE = (4, 5, 3, 6)
# Sums of at most 60 numbers of order ten in float32. Haiku takes the variance from the mean of squares, which is up to ten times it.
ATOL = 60 * 10 * 10 * 2**-24
CASES = {
    "BatchNorm": ("BatchNorm", {"create_scale": True, "create_offset": True, "decay_rate": 0.9}),
    "BatchNorm-slow": ("BatchNorm", {"create_scale": True, "create_offset": False, "decay_rate": 0.999, "eps": 1e-3}),
    "BatchNorm-none": ("BatchNorm", {"create_scale": False, "create_offset": False, "decay_rate": 0.0}),
    "BatchNorm-second": ("BatchNorm", {"create_scale": True, "create_offset": True, "decay_rate": 0.5, "data_format": "NC..."}),
    "BatchNorm-axes": ("BatchNorm", {"create_scale": True, "create_offset": True, "decay_rate": 0.9, "axis": [0, 2]}),
    "LayerNorm": ("LayerNorm", {"axis": -1, "create_scale": True, "create_offset": True}),
    "LayerNorm-axes": ("LayerNorm", {"axis": (1, 2, 3), "param_axis": (2, 3), "create_scale": True, "create_offset": True}),
    "LayerNorm-slice": ("LayerNorm", {"axis": slice(1, None), "param_axis": -1, "create_scale": True, "create_offset": False}),
    "InstanceNorm": ("InstanceNorm", {"create_scale": True, "create_offset": True, "eps": 1e-2}),
    "InstanceNorm-second": ("InstanceNorm", {"create_scale": False, "create_offset": True, "data_format": "channels_first"}),
    "GroupNorm": ("GroupNorm", {"groups": 3, "eps": 1e-2}),
    "GroupNorm-second": ("GroupNorm", {"groups": 5, "data_format": "channels_first"}),
    "GroupNorm-axes": ("GroupNorm", {"groups": 2, "axis": slice(2, None), "create_offset": False}),
    "RMSNorm": ("RMSNorm", {"axis": -1, "eps": 1e-3}),
    "RMSNorm-axes": ("RMSNorm", {"axis": (2, 3), "param_axis": (2, 3)}),
}
IN_TREES = ("create_scale", "create_offset")


def transformed(cls, options):
    def run(x, train):
        module = getattr(hk, cls)(**options, name="norm")
        return module(x, train) if cls == "BatchNorm" else module(x)

    pure = hk.transform_with_state(run)
    compiled = jax.jit(lambda params, state, x, train: pure.apply(params, state, None, x, train), static_argnums=3)
    return standard(pure.init), standard(compiled)


def standard(function):
    """Haiku relies on JAX's promotion of dtypes."""

    def called(*args):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return called


def batches(rng, number=3):
    return [(rng.normal(size=SHAPE) * (i + 1) + i).astype(np.float32) for i in range(number)]


def made(case, rng, steps=2):
    """-> trees as some steps of a training leave them, with drawn parameters, and the transformed function."""
    cls, options = CASES[case]
    init, run = transformed(cls, options)
    params, state = init(jax.random.key(0), np.zeros(SHAPE, np.float32), True)
    params = jax.tree.map(lambda a: rng.uniform(0.5, 1.5, a.shape).astype(a.dtype), params)
    for x in batches(rng, steps):
        _, state = run(params, state, x, True)
    return run, params, state, cls, {k: v for k, v in options.items() if k not in IN_TREES}


call = nnx.jit(lambda module, x: module(x))


# Others than the first of their kind, which compile as long.
SLOW = {"BatchNorm-second", "BatchNorm-none", "LayerNorm-slice", "InstanceNorm-second", "GroupNorm-second", "GroupNorm-axes"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES])
def test_there_and_back(case, rng):
    run, params, state, cls, options = made(case, rng)
    norm = convert.of_haiku(cls, "norm", params, state, **options, ndim=4)
    back = convert.as_haiku(norm, "norm", ndim=4)
    run_back = transformed(back.cls, back.options)[1]
    for key, a in {f"{m}/{k}": a for m, entries in params.items() for k, a in entries.items()}.items():
        module, name = key.rsplit("/", 1)
        np.testing.assert_array_equal(back.params[module][name], a, key)
    assert jax.tree.structure(back.state) == jax.tree.structure(dict(state)) or cls != "BatchNorm"
    state_back, module = back.state, norm.to_nnx()
    for x in batches(rng):
        if cls == "BatchNorm":
            module.eval()
            want = run(params, state, x, False)[0]
            np.testing.assert_allclose(call(module, x), want, rtol=0, atol=ATOL)
            np.testing.assert_allclose(run_back(back.params, state_back, x, False)[0], want, rtol=0, atol=ATOL)
            module.train()
        want, state = run(params, state, x, True)
        np.testing.assert_allclose(call(module, x), want, rtol=0, atol=ATOL)
        y, state_back = run_back(back.params, state_back, x, True)
        np.testing.assert_allclose(y, want, rtol=0, atol=ATOL)
        if cls == "BatchNorm":
            check_state(module, state, state_back, options["decay_rate"])


def check_state(module, state, state_back, decay):
    for name in ("mean", "var"):
        there, again = (one[f"norm/~/{name}_ema"] for one in (state, state_back))
        bound = ATOL * max(1, float(abs(there["average"]).max()))
        for got in (getattr(module, name)[...], again["average"]):
            np.testing.assert_allclose(np.ravel(got), np.ravel(there["average"]), rtol=0, atol=bound, err_msg=name)
        assert not decay or int(again["counter"]) == int(there["counter"])  # with 0 all steps but the first are alike


def test_before_any_step(rng):
    """Haiku's averages start at 0, the variance too."""
    run, params, state, cls, options = made("BatchNorm", rng, steps=0)
    norm = convert.of_haiku(cls, "norm", params, state, **options)
    assert norm.count == 0 and not norm.var.any()
    module, x = norm.to_nnx(), batches(rng)[0]
    module.eval()
    np.testing.assert_allclose(call(module, x), run(params, state, x, False)[0], rtol=2**-20)
    module.train(), call(module, x)
    _, state = run(params, state, x, True)
    np.testing.assert_allclose(module.var[...], state["norm/~/var_ema"]["average"].ravel(), rtol=0, atol=ATOL)


def test_without_a_count(rng):
    """An average that is not debiased goes on as it is, there too."""
    kept = {name: rng.uniform(0.5, 1.5, 6).astype(np.float32) for name in ("mean", "var")}
    norm = convert.Norm(kind="BatchNorm", shape=(6,), momentum=0.99, **kept)
    module, theirs = norm.to_nnx(), convert.as_haiku(norm, "norm")
    run, (x, *_) = transformed(theirs.cls, theirs.options)[1], batches(rng)
    _, state = run(theirs.params, theirs.state, x, True)
    module(x)
    for name in ("mean", "var"):
        np.testing.assert_allclose(module.__dict__[name][...], state[f"norm/~/{name}_ema"]["average"].ravel(), rtol=0, atol=ATOL)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_counts(decay):
    """Every number of steps is told from the count, as float32 keeps it, or there is nothing left to debias."""
    from jnorm.tools.convert._haiku import count_of, steps_of

    for steps in (0, 1, 2, 3, 10, 100, 1000, 20000):
        count = float(np.float32(count_of(steps, decay)))
        brute = float(sum(np.float64(decay) ** np.arange(steps)))
        np.testing.assert_allclose(count, brute, rtol=1e-6)
        again = steps_of(count, decay, "Haiku")
        assert abs(decay**again - decay**steps) <= 2**-23 * max(1.0, steps**0.5), (steps, again)


def test_bfloat16(rng):
    init, run = transformed(*CASES["BatchNorm"])
    x = jnp.asarray(batches(rng)[0], jnp.bfloat16)
    params, state = init(jax.random.key(0), x, True)
    _, state = run(params, state, x, True)
    assert state["norm/~/mean_ema"]["average"].dtype == jnp.bfloat16
    norm = convert.of_haiku("BatchNorm", "norm", params, state, decay_rate=0.9)
    module = norm.to_nnx()
    module.eval()
    want = np.asarray(run(params, state, x, False)[0], np.float32)
    got = module(x)
    # Haiku subtracts, multiplies and adds in bfloat16.
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0, atol=6 * 2**-8 * abs(want).max())


def test_refusals(rng):
    run, params, state, cls, options = made("BatchNorm", rng)
    with refuses("cls", "'Dense'"):
        convert.of_haiku("Dense", "norm", params)
    with refuses("decay_rate of a BatchNorm"):
        convert.of_haiku(cls, "norm", params, state)
    with refuses("hidden / (1 - 0.8**2)", "decay_rate, the momentum here, is another"):
        convert.of_haiku(cls, "norm", params, state, decay_rate=0.8)
    with refuses("no module 'other/~/mean_ema'", "norm/~/mean_ema"):
        convert.of_haiku(cls, "other", params, state, decay_rate=0.9)
    with refuses("'norm'", "['w']"):
        convert.of_haiku("LayerNorm", "norm", {"norm": {"w": np.ones(3)}}, axis=-1)
    with refuses("axis of a LayerNorm"):
        convert.of_haiku("LayerNorm", "norm", params)
    with refuses("scale of 'norm'", "(1, 1, 1, 7)", "(6,)"):
        convert.of_haiku(cls, "norm", {"norm": {"scale": np.ones((1, 1, 1, 7))}}, state, decay_rate=0.9)
    with refuses("data_format"):
        convert.of_haiku(cls, "norm", params, state, decay_rate=0.9, data_format="middle")
    norm = convert.of_haiku(cls, "norm", params, state, **options)
    for change, told in (
        ({"running_var_correction": 1}, "running_var_correction=0"),
        ({"momentum": None}, "cumulative"),
        ({"count": 1.5}, "no whole number of steps"),
        ({"activation": "relu"}, "no activation"),
    ):
        with refuses(told):
            convert.as_haiku(dataclasses.replace(norm, **change), "norm")
    with refuses("no TrackedInstanceNorm"):
        convert.as_haiku(dataclasses.replace(norm, kind="TrackedInstanceNorm"), "norm")

"""Which form of the kernels is lowered: as chosen, inside everything that JAX does to a function, on every platform."""

import concurrent.futures
import functools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cases
import distributed
import jnorm
import native_fuzz as fuzz
from cases import BY_NAME, replace
from native_fuzz import native
from pairwise import checkerboard, every_other

each_form = pytest.mark.parametrize("form", [pytest.param("native", marks=native), "xla"])
SHAPE = (8, 4, 3, 16)
CALLS = {"batch_norm": (2, 4), "layer_norm": (1, 2), "rms_norm": (1, 2), "group_norm": (1, 2), "instance_norm": (1, 2)}
CALLS |= {"batch_norm_output_mask": (2, 4), "layer_norm_output_mask": (1, 2), "group_norm_output": (1, 2)}
CALLS |= {"tracked_instance_norm": (2, 4), "add_layer_norm": (1, 2), "add_rms_norm": (1, 2), "batch_norm_relu_residual": (2, 4)}


def called(program):
    return re.findall(r'custom_call_target="jnorm_(\w+)"', program.compile().as_text())


def case_of(name, shape=SHAPE):
    return replace(
        BY_NAME[name], shape=shape, mask=None, options={k: 4 if k == "num_groups" else v for k, v in BY_NAME[name].options.items()}
    )


@pytest.mark.parametrize("dtype", ["bfloat16", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("float32", "float16"))])
@pytest.mark.parametrize(("name", "form"), checkerboard(CALLS, ["native", "xla"]))
def test_number_of_calls(form, name, dtype):
    case = case_of(name)
    given = cases.inputs(case, dtype=dtype)
    with jnorm.kernels(form):
        forward = called(jax.jit(functools.partial(cases.call, case)).lower(given))
        step = called(jax.jit(cases.value_and_gradients(case)).lower(given))
    assert (len(forward), len(step)) == (CALLS[name] if form == "native" else (0, 0)), (forward, step)


MISSING = {  # what the kernels do not have, or are slower at, and the calls that remain
    "short rows": (jnorm.layer_norm, (64, 7), "float32", 0),
    "few long rows": (jnorm.layer_norm, (2, 1 << 17), "float32", 0),
    "rows apart": (functools.partial(jnorm.layer_norm, reduction_axes=0, feature_axes=0), (32, 16), "float32", 0),
    "nothing": (jnorm.layer_norm, (0, 16), "float32", 0),
    "empty groups": (functools.partial(jnorm.group_norm, num_groups=2), (2, 0, 8), "float32", 0),
    "channels first": (functools.partial(jnorm.group_norm, num_groups=2, feature_axes=1), (2, 8, 20), "float32", 2),
    "reduced on both sides": (functools.partial(jnorm.moments, reduction_axes=(0, 2)), (4, 3, 15, 8), "float32", 0),
    "and long": (functools.partial(jnorm.moments, reduction_axes=(0, 2)), (4, 3, 16, 8), "float32", 1),
}


@native
@pytest.mark.parametrize("what", MISSING)
def test_what_the_kernels_do_not_have(what):
    norm, shape, dtype, number = MISSING[what]
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    out = {}
    for form in fuzz.FORMS:
        with jnorm.kernels(form):
            run = jax.jit(norm)
            assert len(called(run.lower(x))) == (number if form == "native" else 0)
            out[form] = run(x)
    for one, two in zip(*map(jax.tree.leaves, out.values()), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 if number else 0)


# The last digits of these two programs differ, which tells whose an answer is.
PROBE = np.random.default_rng(0).normal(size=(64, 3, 33)).astype("float32")


def probe(x):
    return jnorm.batch_norm(x, jnorm.batch_norm_state(33), activation="gelu")[0]


@functools.cache
def answers():
    found = {}
    for form in fuzz.FORMS:
        with jnorm.kernels(form):
            found[form] = np.asarray(jax.jit(probe).lower(PROBE).compile()(PROBE))
    assert (found["native"] != found["xla"]).any()
    return found


def whose(y):
    return [form for form, answer in answers().items() if np.array_equal(y, answer)]


@native
@pytest.mark.parametrize("order", [("native", "xla"), ("xla", "native")], ids=" then ".join)
def test_the_choice_is_in_the_key_of_jit(order, compilations):
    run = jax.jit(lambda x: probe(x))
    x, _ = jnp.asarray(PROBE), answers()
    with compilations() as count:
        for form in (*order, *order, None):
            form = form or jnorm.kernels_status().active
            with jnorm.kernels(form):
                assert whose(run(x)) == [form]
    assert count() == 2


@native
def test_nested_choices():
    run = jax.jit(lambda x: probe(x))
    default = jnorm.kernels_status().active
    with jnorm.kernels("xla"):
        with jnorm.kernels("native"):
            assert whose(run(PROBE)) == ["native"]
            with pytest.raises(ZeroDivisionError), jnorm.kernels("xla"):
                assert whose(run(PROBE)) == ["xla"]
                raise ZeroDivisionError
            assert whose(run(PROBE)) == ["native"] == [jnorm.kernels_status().active]
        assert whose(run(PROBE)) == ["xla"]
    assert whose(run(PROBE)) == [default]


@native
def test_the_choice_is_a_thread_s_own():
    run = jax.jit(lambda x: probe(x))
    default = jnorm.kernels_status().active
    other = {"native": "xla", "xla": "native"}[default]
    chosen, done = threading.Event(), threading.Event()

    def in_thread():
        before = whose(run(PROBE))
        with jnorm.kernels(other):
            chosen.set()
            done.wait(60)
            return before, whose(run(PROBE))

    with concurrent.futures.ThreadPoolExecutor(1) as pool, jnorm.kernels(other):
        running = pool.submit(in_thread)
        assert chosen.wait(60)
        with jnorm.kernels(default):
            assert whose(run(PROBE)) == [default]
        done.set()
        assert running.result() == ([default], [other])


@native
@pytest.mark.parametrize("order", [("native", "xla"), ("xla", "native")], ids=" then ".join)
def test_without_jit(order):
    """Each op is compiled by itself, and cached for its form."""
    x = jnp.asarray(PROBE[:, 0])
    found = {}
    for form in (*order, *order):
        with jnorm.kernels(form):
            y = np.asarray(jnorm.layer_norm(x))
            np.testing.assert_array_equal(found.setdefault(form, y), y)
    assert (found["native"] != found["xla"]).any()


def scanned(f, x):
    return jax.lax.scan(lambda carry, _: (f(carry), None), x, None, length=3)[0]


def over_devices(f, x):
    return jax.shard_map(f, mesh=distributed.mesh_of(), in_specs=P("d"), out_specs=P("d"))(x)


def partly_manual(f, x):
    mesh = distributed.mesh_of((4, 2), ("d", "e"))
    return jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"})(x)


WRAPPED = {  # what wraps a norm and its gradient, and the calls of a layer norm in it
    "vmap": (lambda f, x: jax.vmap(f)(x), 2),
    "nested vmap": (lambda f, x: jax.vmap(jax.vmap(f, 1, 1))(x), 2),
    "scan": (scanned, 2),
    "remat": (lambda f, x: jax.checkpoint(f)(x), 2),
    "while": (lambda f, x: jax.lax.fori_loop(0, 3, lambda _, v: f(v), x), 2),
    "cond": (lambda f, x: jax.lax.cond(x.sum() > 0, f, lambda v: v, x), 2),
    "shard_map": (over_devices, 2),
    "partly manual": (partly_manual, 2),
    "jit in jit": (lambda f, x: jax.jit(f)(x), 2),
}


def derivative(x):
    y, vjp = jax.vjp(jnorm.layer_norm, x)
    return vjp(y * x)[0]


@native
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_inside_transformations(wrapper):
    wrap, number = WRAPPED[wrapper]
    x = np.random.default_rng(0).normal(size=SHAPE).astype("float32")
    run, out = jax.jit(lambda x: wrap(derivative, x)), {}
    for form in fuzz.FORMS:
        with jnorm.kernels(form):
            out[form] = run(x)
            assert len(called(run.lower(x))) == (number if form == "native" else 0)
    np.testing.assert_allclose(out["native"], out["xla"], rtol=0, atol=1e-4)


@native
@pytest.mark.parametrize("where", ["sharded", "pmap"])
def test_over_devices(where):
    """jit over sharded arrays lowers on a thread of the compiler's own; the same function serves both choices, in turn."""
    x = np.random.default_rng(0).normal(size=SHAPE).astype("float32")
    run = jax.pmap(derivative) if where == "pmap" else jax.jit(derivative)
    x = x if where == "pmap" else jax.device_put(x, NamedSharding(distributed.mesh_of(), P("d")))
    out = []
    for form in (*fuzz.FORMS, *fuzz.FORMS):
        with jnorm.kernels(form):
            out.append(np.asarray(run(x)))
            assert len(called(run.lower(x))) == (2 if form == "native" else 0)
    np.testing.assert_array_equal(out[:2], out[2:])
    assert (out[0] != out[1]).any()
    np.testing.assert_allclose(out[0], out[1], rtol=0, atol=1e-4)


# --- other platforms, and export ----------------------------------------------------------------------------------------------


def test_export_with_xla_s_code():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype("float32")
    with jnorm.kernels("xla"):
        run = jax.jit(derivative)
        there = jax.export.deserialize(jax.export.export(run)(x).serialize())
        np.testing.assert_array_equal(there.call(x), run(x))


@native
def test_export_with_native_kernels_is_refused_by_jax():
    x = jnp.ones((8, 16))
    with jnorm.kernels("native"), pytest.raises(ValueError, match="(?s)Cannot serialize code with custom calls.*jnorm_row_norm"):
        jax.export.export(jax.jit(jnorm.layer_norm))(x)


SYMBOLIC = ["batch_norm_relu_residual", "batch_norm_mask", "batch_norm_evaluate", "tracked_instance_norm", "filter_response_norm"]
SYMBOLIC += ["batch_renorm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "local_response_norm", "divisive_norm"]


@pytest.mark.parametrize("name", every_other(SYMBOLIC))
def test_export_for_any_batch(name):
    """Values and gradients of a program with a symbol for the batch, exported whatever kernels are chosen, run on two batches."""
    case = case_of(name)
    given = cases.inputs(case)
    batched = [key for key in ("x", "dy", "residual", "mask") if key in given and given[key].shape[0] == len(given["x"])]
    rest = {key: value for key, value in given.items() if key not in batched}

    def run(arrays):
        return cases.value_and_gradients(case)(arrays | rest)

    (b,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(run))({k: jax.ShapeDtypeStruct((b, *given[k].shape[1:]), given[k].dtype) for k in batched})
    for rows in (slice(None), slice(0, 2)):
        arrays = {key: given[key][rows] for key in batched}
        with jnorm.kernels("xla"):
            want = jax.jit(run)(arrays)
        for one, two in zip(jax.tree.leaves(exported.call(arrays)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
@each_form
def test_other_platforms_never_call_the_cpu_s_kernels(form, platform):
    case = case_of("batch_norm_relu_residual")
    with jnorm.kernels(form):
        traced = jax.jit(cases.value_and_gradients(case)).trace(cases.inputs(case))
        assert "jnorm_" not in traced.lower(lowering_platforms=(platform,)).as_text()
        both = traced.lower(lowering_platforms=("cpu", platform)).as_text()
    assert ("@jnorm_" in both) is (form == "native")

"""The native kernels from Python, with everything that decides what they compute: numbers, shapes, threads, processes, instruction sets."""

import concurrent.futures
import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jnorm
import native_fuzz as fuzz
import oracles
from cases import BY_NAME, replace
from jnorm._kernels import column
from native_fuzz import native, python
from pairwise import checkerboard

FEW, MANY = 12, 300


def seeds(few, many):
    return pytest.mark.parametrize("seed", [*range(few), *(pytest.param(i, marks=pytest.mark.slow) for i in range(few, many))])


# --- both forms against float64 -----------------------------------------------------------------------------------------------


def drawn(seed, x64=False):
    """-> call, its programs, {kind of numbers: inputs}"""
    call = fuzz.draw(seed, x64)
    given = call.inputs(seed)
    kinds = {k: given | {"x": fuzz.numbers(k, call.case.shape, call.x, seed)} for k in fuzz.names_of(call)}
    # Where a batch norm counts nothing, what is not finite is not read as the running mean.
    if call.counts_everywhere(given):
        kinds["not finite under the mask"] = fuzz.spoiled(given, False, seed)
    return call, {form: call.results(form) for form in fuzz.FORMS}, kinds


@native
@seeds(FEW, MANY)
def test_norms(seed):
    """Values, gradients and state on numbers of every kind."""
    call, programs, kinds = drawn(seed)
    for name, given in kinds.items():
        for form, run in programs.items():
            try:
                call.check(given, run(given))
            except AssertionError as e:
                raise AssertionError(f"{form}, {name}, {call}") from e
    # Where something counted is not finite, they agree on what of the results is not.
    found = [jax.tree.map(fuzz.classes, run(fuzz.spoiled(kinds["plain"], True, seed))) for run in programs.values()]
    jax.tree.map(functools.partial(np.testing.assert_array_equal, err_msg=str(call)), *found)


@native
@seeds(5, 40)
def test_norms_in_float64(seed, x64):
    call, programs, kinds = drawn(seed, x64=True)
    for given in kinds.values():
        call.check_forms(given, *(run(given) for run in programs.values()))


# --- column ops on operands that no norm gives them ---------------------------------------------------------------------------


def draw_operands(seed):
    """-> operands, act, y's dtype: shift is not offset, and what is small varies along any axes."""
    rng = np.random.default_rng(seed)
    shape = fuzz.shape_of(rng, int(rng.integers(1, 6))) if seed % fuzz.EVERY else fuzz.LARGE[seed // fuzz.EVERY % len(fuzz.LARGE)]
    varying = fuzz.some(rng, range(len(shape)))
    kept = [i for i in varying if rng.random() < 0.8]
    small = [n if i in varying else 1 for i, n in enumerate(shape)]
    stats = [n if i in kept else 1 for i, n in enumerate(shape)]
    x, res, y = (fuzz.KINDS[int(rng.choice(3, p=[0.6, 0.2, 0.2]))] for _ in range(3))
    named = {"x": (rng.normal(size=shape) + 3).astype(x)}
    named |= {k: rng.normal(size=stats).astype("float32") for k in ("center", "offset")}
    named |= {k: rng.normal(size=small).astype("float32") for k in ("shift", "mul", "add")}
    named |= {"residual": rng.normal(size=shape).astype(res)} if rng.random() < 0.5 else {}
    named |= {"mask": rng.random([n if rng.random() < 0.5 else 1 for n in shape]) < 0.7} if rng.random() < 0.5 else {}
    given = {"dy": rng.normal(size=shape).astype(y), "a": rng.normal(size=small), "b": rng.normal(size=small)}
    given |= {k: given[k].astype("float32") for k in ("a", "b")}
    return named, given, fuzz.ACTIVATIONS[int(rng.integers(5))], y


def column_results(named, given, act, dtype):
    """-> y, first, second, dx, dresidual where there is a residual: all three ops that a kernel has beside the moments."""
    o = column.Operands(**{k: jnp.asarray(v) for k, v in named.items()})
    params = {"act": act, "dtype": jnp.dtype(dtype), **o.params()}
    dy, a, b = (jnp.asarray(given[k]) for k in ("dy", "a", "b"))
    [y] = column.apply(*o.present(), **params)
    sums = column.cotangent_sums(dy, *o.present(), **params)
    return [y, *sums, *column.cotangent_apply(dy, a, b, *o.present(), **params)]


def column_oracle(named, given, act):
    """The same from the formulas of column.py, each with the size of what it is added up from."""
    wide = {k: oracles.wide(v) for k, v in (named | given).items() if k != "mask"}
    x, mask = wide["x"], oracles.full_mask(named.get("mask"), named["x"].shape)
    xc, xc_size = x - wide["center"] - wide["offset"], abs(x - wide["center"]) + abs(wide["offset"])
    shifted, shifted_size = x - wide["center"] - wide["shift"], abs(x - wide["center"]) + abs(wide["shift"])
    residual = wide.get("residual", np.zeros(1))
    z = shifted * wide["mul"] + wide["add"] + residual
    z_size = shifted_size * abs(wide["mul"]) + abs(wide["add"]) + abs(residual)
    value, slope = oracles.ACTIVATIONS[act](z)
    g, g_size = slope * wide["dy"], abs(wide["dy"]) * (1 + z_size if act else 1)
    axes = tuple(i for i, n in enumerate(wide["mul"].shape) if n == 1)
    total = lambda v: v.sum(axes, keepdims=True)  # noqa: E731
    dx = g * wide["mul"] + mask * (wide["a"] + wide["b"] * xc)
    dx_size = g_size * abs(wide["mul"]) + abs(wide["a"]) + abs(wide["b"]) * xc_size
    pairs = [(value, z_size), (total(g), total(g_size)), (total(g * xc), total(g_size * xc_size)), (dx, dx_size), (g, g_size)]
    return [oracles.Bounded(*p) for p in pairs[: None if "residual" in named else 4]]


@native
@seeds(FEW, MANY)
def test_column_ops(seed):
    """On operands that are no norm's; values are right to some eps of what they are added up from."""
    named, given, act, dtype = draw_operands(seed)
    run = jax.jit(functools.partial(column_results, act=act, dtype=dtype))
    length = named["x"].size // named["mul"].size
    for form in fuzz.FORMS:
        with jnorm.kernels(form):
            found = run(named, given)
        for i, (got, want) in enumerate(zip(found, column_oracle(named, given, act), strict=True)):
            oracles.assert_close(got, want, length if i in (1, 2) else 0, what=f"{form}, result {i} of {named['x'].shape}")


# --- threads and processes ------------------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("length", [1024, 65536])
def test_rows_whose_first_values_are_far(length):
    """Where the mean was looked for in the wrong place, it is taken again."""
    x = np.random.default_rng(0).normal(size=(8, length)).astype(np.float32)
    x[:, 1:16] = 1e8
    with jnorm.kernels("native"):
        y = np.asarray(jnorm.layer_norm(x))
    wide = x.astype(np.float64)
    want = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    eps = np.finfo(np.float32).eps
    # The squares are added up in 64 sums.
    assert abs(y - want).max() < (length / 64 + 16) * eps * abs(want).max()
    # All other values are next to nothing beside the spread: what is wrong there is the mean.
    assert abs((y - want)[:, 16:]).max() < (length / 64 + 16) * eps * abs(want[:, 16:]).max() + eps


@native
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_bitwise_the_same_with_any_number_of_threads(tmp_path):
    """NPROC is what XLA's CPU client reads for the size of its pool."""
    found = []
    for number in (1, 2, 5):
        path = tmp_path / f"{number}.npz"
        done = python(fuzz.HERE / "native_fuzz.py", path, NPROC=str(number), JNORM_KERNELS="native")
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(dict(np.load(path)))
        assert found[-1].pop("threads") == number
    for other in found[1:]:
        assert set(other) == set(found[0])
        for key, value in found[0].items():
            np.testing.assert_array_equal(value, other[key], key)


@native
@pytest.mark.parametrize("isa", ["baseline", "avx512", *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("avx2", "avx512_bf16"))])
def test_instruction_sets(isa, tmp_path):
    """The program itself compares with float64."""
    done = python(fuzz.HERE / "native_fuzz.py", tmp_path / "results.npz", JNORM_ISA=isa, JNORM_KERNELS="native")
    assert done.returncode == 0, done.stderr[-3000:]
    used = str(np.load(tmp_path / "results.npz")["isa"])
    if used != isa:
        pytest.skip(f"this machine, or this build, does not have {isa}: {used} instead")


@native
def test_two_threads_at_once():
    """Two programs over and over, each on a Python thread, both on XLA's threads."""
    runs = []
    for seed in (5, 11):  # large ones
        call = fuzz.draw(seed)
        runs.append((call.results("native"), call.inputs(seed)))
    alone = [jax.tree.map(np.asarray, run(given)) for run, given in runs]

    def repeat(i):
        run, given = runs[i]
        for _ in range(20):
            jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, run(given)), alone[i])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(repeat, [0, 1, 0, 1]))


FORK = """
import os, sys
import jnorm, native_fuzz
child = os.fork()
call = native_fuzz.draw(11)
given = call.inputs(11)
call.check(given, call.results("native")(given))
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_before_any_computation():
    """Parent and child both compute."""
    done = python("-W", "ignore:os.fork", "-c", FORK)
    assert done.returncode == 0, done.stderr[-3000:]


@native
def test_eight_devices_in_a_process():
    """As many programs at once on one pool of fewer threads: a kernel waits for no thread that is not its own."""
    call = fuzz.draw(1)
    given = jax.tree.map(lambda a: np.stack([a] * 8), call.inputs(1))
    with jnorm.kernels("native"):
        run = jax.pmap(cases.value_and_gradients(call.case, dtype=call.y))
        for _ in range(5):
            out = jax.tree.map(np.asarray, run(given))
    for i in range(8):
        call.check(call.inputs(1), jax.tree.map(lambda a, i=i: a[i], out))


# --- memory -------------------------------------------------------------------------------------------------------------------


MEMORY = ["batch_norm", "batch_norm_relu_residual", "layer_norm", "rms_norm", "group_norm", "add_layer_norm"]


@native
@pytest.mark.parametrize(
    ("name", "dtype"),
    checkerboard([*MEMORY, "batch_norm_output_mask", "rms_norm_output", "group_norm_output"], ["float32", "bfloat16"]),
)
def test_memory(name, dtype):
    """No temporary of the size of x: numbers by row, of 512 values, and by sample and channel, of 576, are the largest. What is kept is x,
    or y in its place, or the sum, and the residual where an activation follows it."""
    case = BY_NAME[name]
    options = {k: 8 if k == "num_groups" else v for k, v in case.options.items()}
    case = replace(case, shape=(4, 24, 24, 512), options=options)
    given = cases.inputs(case, dtype=dtype)
    inner, rest = cases.split(case, given)

    def run(inner):
        # Both results: where the sum is not used, it is a temporary, and so are zeros for its cotangent.
        return jnorm.add_layer_norm(**inner) if case.adds else cases.call(case, inner | rest)[0]

    def step(inner, dy):
        y, vjp = jax.vjp(run, inner)
        return y, vjp((dy, dy) if case.adds else dy)

    with jnorm.kernels("native"):
        compiled = jax.jit(step).lower(inner, given["dy"]).compile()
        _, vjp = jax.vjp(run, inner)
    size = given["x"].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.05 * size
    large = [leaf.nbytes for leaf in jax.tree.leaves(vjp) if leaf.size >= given["x"].size]
    assert large == [size] * (2 if case.act and case.residual else 1)

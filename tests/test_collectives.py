"""Collectives counted in compiled programs, derivatives of second order over devices, and transformations on top of devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cases
import distributed
import plain
from cases import BY_NAME, replace
from distributed import mesh_of

SHAPE = (16, 8, 4, 6)
CASE = replace(BY_NAME["batch_norm"], shape=SHAPE)
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def collectives(compiled):
    """-> [(kind, elements of the largest array in its result)]."""
    found = COLLECTIVE.findall(compiled.as_text())
    return [(kind, max(elements(dims) for dims in re.findall(r"\[([\d,]*)\]", result))) for result, kind in found]


def elements(dims):
    return int(np.prod([int(d) for d in dims.split(",") if d]))


ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def traffic(compiled, participants=8):
    """-> [(kind, bytes that each device sends)], sorted: of an all-gather, whose result has everybody's, the device's own part."""
    found = []
    for result, kind in COLLECTIVE.findall(compiled.as_text()):
        size = sum(int(bits) // 8 * elements(dims) for _, bits, dims in ARRAY.findall(result))
        found.append((kind, size // participants if kind == "all-gather" else size))
    return sorted(found)


def kinds(compiled):
    return sorted(kind for kind, _ in collectives(compiled))


def sharded_program(f, given, check_vma, out_specs):
    run = jax.shard_map(f, mesh=mesh_of(), in_specs=(distributed.specs(given, P("d")),), out_specs=out_specs, check_vma=check_vma)
    return jax.jit(run).lower(given).compile()


GRADIENTS = {"x": P("d"), "scale": P(), "bias": P()}


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_collective_forward(check_vma):
    program = sharded_program(lambda g: cases.call(CASE, g, axis_name="d"), cases.inputs(CASE), check_vma, (P("d"), P()))
    assert len(kinds(program)) == 1, kinds(program)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("check_vma", [True, False])
def test_one_collective_each_way(check_vma, masked, rng):
    """Gradients of x, scale and bias together; unchecked, those of scale and bias are left for the caller to sum."""
    given = cases.inputs(CASE, mask=distributed.uneven(rng, SHAPE) if masked else None)
    out = (P("d"), P(), GRADIENTS if check_vma else {"x": P("d"), "scale": P("d"), "bias": P("d")})
    program = sharded_program(cases.value_and_gradients(CASE, axis_name="d"), given, check_vma, out)
    assert kinds(program) == ["all-gather", "all-reduce"]


@pytest.mark.parametrize("mode", ["shard_map", "auto"])
def test_no_collective_in_evaluation(mode):
    case = replace(BY_NAME["batch_norm_evaluate"], shape=SHAPE)
    given = cases.inputs(case)
    if mode == "shard_map":
        program = sharded_program(lambda g: cases.call(case, g, axis_name="d"), given, True, (P("d"), P()))
    else:
        program = auto_program(functools.partial(cases.call, case), given)
    assert kinds(program) == []


def auto_program(run, given, spec=distributed.BATCH_SPEC, shape=(8,), names=("d",)):
    mesh, where = mesh_of(shape, names), distributed.specs(given, spec)
    placed = {k: jax.tree.map(lambda a, k=k: jax.device_put(a, NamedSharding(mesh, where[k])), v) for k, v in given.items()}
    return jax.jit(run).lower(placed).compile()


LAYOUTS = {"batch": {}, "batch and height": {"spec": P("b", "h"), "shape": (4, 2), "names": ("b", "h")}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_arrays_one_collective_each_way(layout):
    program = auto_program(cases.value_and_gradients(CASE), cases.inputs(CASE), **LAYOUTS[layout])
    forward = auto_program(functools.partial(cases.call, CASE), cases.inputs(CASE), **LAYOUTS[layout])
    assert len(kinds(forward)) == 1, kinds(forward)
    assert len(kinds(program)) == 2, kinds(program)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["batch_norm_relu_residual", "batch_norm_mask", "layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_x_is_never_gathered(name, layout):
    """Everything that travels is smaller than one device's share of x."""
    case = replace(BY_NAME[name], shape=SHAPE)
    given = cases.inputs(case, mask=None if case.mask is None else np.ones((16, 1, 1, 1), bool))
    program = auto_program(cases.value_and_gradients(case), given, **LAYOUTS[layout])
    assert all(size < given["x"].size // 8 for _, size in collectives(program)), collectives(program)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sharded_channels_of_groups(groups):
    """What travels is by sample and channel, once each way, and nothing where groups lie whole on their devices."""
    options = {"num_groups": groups}
    case = replace(BY_NAME["group_norm"], shape=(4, 8, 8, 16), kept={0: 1, 3: 16 // groups}, options=options)
    given = cases.inputs(case)
    layout = {"spec": P(None, None, None, "d"), "shape": (4,), "names": ("d",)}
    sent = collectives(auto_program(cases.value_and_gradients(case), given, **layout))
    assert len(sent) == (0 if groups == 4 else 2) and all(kind == "all-gather" for kind, _ in sent), sent
    assert all(size <= 4 * 4 * 16 for _, size in sent)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_per_sample_norms_send_nothing_for_the_forward_pass(name):
    case = replace(BY_NAME[name], shape=SHAPE)
    assert kinds(auto_program(lambda g: cases.call(case, g)[0], cases.inputs(case))) == []


# --- second order -----------------------------------------------------------------------------------------------------------

SMALL = (16, 2, 1, 3)


def loss(norm, given):
    """A local sum: over devices, the losses add up."""
    return lambda inner: jnp.sum(norm(given | inner) ** 2 * given["dy"])


def hessian_vector(norm):
    """(y, state, gradients) as distributed's modes want it: the product in all arguments together."""

    def run(given):
        inner = {k: given[k] for k in CASE.differentiable}
        tangent = {k: given[f"v_{k}"] for k in inner}
        rest = {k: v for k, v in given.items() if not k.startswith("v_")}
        product = jax.jvp(jax.grad(loss(norm, rest)), (inner,), (tangent,))[1]
        return product["x"], rest["state"], product

    return run


def second_order_inputs(rng):
    case = replace(CASE, shape=SMALL)
    masked = distributed.uneven(rng, SMALL)
    one, two = (cases.inputs(case, seed, "float64", SMALL, masked, "float64") for seed in range(2))
    return case, one | {f"v_{k}": two[k] for k in case.differentiable}


def close(got, want):
    """float64: 1e-10 of the largest entry is 1e6 roundings; a wrong term shows at order one."""
    for key in want:
        np.testing.assert_allclose(got[key], want[key], rtol=0, atol=1e-10 * max(abs(np.asarray(want[key])).max(), 1), err_msg=key)


@pytest.mark.parametrize("mode", [*distributed.MODES, "auto"])
def test_second_order(mode, rng, x64, unoptimized, monkeypatch):
    monkeypatch.setattr(distributed, "WHOLE", (*distributed.WHOLE, "v_scale", "v_bias"))
    case, given = second_order_inputs(rng)
    static = {k: given.pop(k) for k in ("mask", "state")}
    want = jax.jit(lambda floats: hessian_vector(functools.partial(plain.norm, case))(static | floats)[2])(given)
    given |= static
    if mode == "auto":
        got = distributed.by_auto_mesh(hessian_vector(lambda g: cases.call(case, g)[0]), given)[2]
    else:
        got = distributed.MODES[mode](hessian_vector(lambda g: cases.call(case, g, axis_name="d")[0]), given)[2]
    close(got, want)


# --- on top of devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shard_map", "shard_map unchecked", "pmap"])
def test_vmap_inside(mode):
    """Three models side by side on every device, synchronized over devices, each with its own statistics."""
    case = replace(CASE, shape=(16, 3, 2, 6))
    many = [cases.inputs(case, seed) for seed in range(3)]
    axes = {k: 0 if k in distributed.WHOLE else 1 for k in many[0]}
    stacked = {k: jax.tree.map(lambda *v, axis=axis: np.stack(v, axis), *(m[k] for m in many)) for k, axis in axes.items()}
    local = jax.vmap(cases.value_and_gradients(case, axis_name="d"), (axes,), (1, 0, {"x": 1, "scale": 0, "bias": 0}))
    y, state, gradients = distributed.MODES[mode](local, stacked)
    for i in range(3):
        cases.check_value(case, many[i], np.asarray(y)[:, i], {k: v[i] for k, v in state.items()})
        picked = {k: np.asarray(v)[i] if k in distributed.WHOLE else np.asarray(v)[:, i] for k, v in gradients.items()}
        cases.check_gradients(case, many[i], picked)


def test_new_values_over_devices_compile_nothing(compilations):
    case = replace(CASE, shape=(16, 3, 2, 6))
    run = jax.jit(
        jax.shard_map(
            cases.value_and_gradients(case, axis_name="d"),
            mesh=mesh_of(),
            in_specs=(distributed.specs(cases.inputs(case), P("d")),),
            out_specs=(P("d"), P(), GRADIENTS),
        )
    )
    jax.block_until_ready(run(cases.inputs(case, 0)))
    with compilations() as count:
        jax.block_until_ready(run(cases.inputs(case, 1)))
    assert count() == 0


def test_a_scan_of_synchronized_steps(rng):
    """State as carry inside shard_map: its type stays replicated."""
    case = replace(CASE, shape=(16, 3, 2, 6))
    given = cases.inputs(case, mask=distributed.uneven(rng))

    def local(g):
        step = lambda state, _: cases.call(case, g | {"state": state}, axis_name="d")[::-1]  # noqa: E731
        state, ys = jax.lax.scan(step, g["state"], None, length=2)
        return ys[1], state

    run = jax.shard_map(local, mesh=mesh_of(), in_specs=(distributed.specs(given, P("d")),), out_specs=(P("d"), P()))
    y, state = jax.jit(run)(given)
    once = cases.oracle_state(case, given)
    cases.check_value(case, given | {"state": once}, y, state)

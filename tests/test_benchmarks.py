"""The benchmark: its deterministic figures are limits here, and its gate is tested; its times are not."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import (
    calling,
    cases,
    claims,
    collectives,
    measure,
    memory,
    networks,
    oracle,
    peers,
)
from benchmarks.cases import Case
from benchmarks.peers import ours
from pairwise import checkerboard

SHAPES = {"batch_norm": (16, 16, 16, 64), "group_norm": (4, 32, 32, 64), "instance_norm": (4, 32, 32, 64)}
ROWS = (512, 512)
OPERATIONS = [(n, op) for n in cases.NORMS for op in ("plain", "act", "add_act", "add")
              if not (op == "act" and n not in cases.ACTIVATION) and not (op == "add_act" and n != "batch_norm")
              and not (op == "add" and n not in cases.ROW_NORMS)]  # fmt: skip
FORMS = ["jnorm native", "jnorm xla"]


@pytest.fixture(autouse=True)
def others_may_promote():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def case_of(norm, op="plain", dtype="float32", shape=None):
    return Case(norm, shape or SHAPES.get(norm, ROWS), dtype, op)


def built(name, case):
    try:
        return peers.build(name, case)
    except peers.Unsupported as reason:
        pytest.skip(str(reason))


def figures(name, case):
    """What the table "Bytes and kernels" says."""
    peer = built(name, case)
    arguments = calling.arguments(case, oracle.inputs(case), peer, {})
    found = memory.of_program(case, calling.step_program(case, peer, "one", arguments).compiled)
    return found | {"residuals": memory.residuals(case, peer, arguments)}


# --- deterministic figures --------------------------------------------------------------------------------------------------

# Numbers per channel, row, or sample and channel: at most 8 of float32 for each row of 512 values.
SMALL = {"float32": 8 / 512, "bfloat16": 16 / 512}
# So many times that XLA writes between its loops: before 0.10.2 some 34 numbers a row, beside 512 of an array of x's size.
BETWEEN_LOOPS = 2 if jax.__version_info__ >= (0, 10, 2) else 5


@pytest.mark.parametrize(
    ("operation", "dtype"), checkerboard(OPERATIONS, cases.BYTES), ids=lambda v: v if isinstance(v, str) else " ".join(v)
)
@pytest.mark.parametrize("form", FORMS)
def test_bytes(form, operation, dtype):
    """Only x is kept, and the residual where an activation follows it; native kernels allocate no array of x's size, and read and write
    nothing beyond the floor."""
    norm, op = operation
    case = case_of(norm, op, dtype)
    found = figures(form, case)
    kept = 2 if op == "add_act" else 1
    assert kept <= found["residuals"] <= kept + SMALL[dtype]
    if form == "jnorm native":
        assert found["temp"] <= claims.TEMP_LIMIT
        # BN + add + act reads x and the residual in both of its backward passes.
        floor = cases.floor(case, "step", 1 << 30) + (2 if op == "add_act" else 0)
        assert found["traffic"] <= floor + 6 * SMALL[dtype]
    else:
        assert found["temp"] <= xla_temp(norm, op, dtype) + BETWEEN_LOOPS * SMALL[dtype]


def xla_temp(norm, op, dtype):
    """What XLA's CPU compiler of jax 0.10.2 materializes, in X: float32 copies of bfloat16 rows and images, and an activation's output."""
    if dtype == "bfloat16":
        return 10 if norm in cases.ROW_NORMS else 4
    return 1 if op == "act" else 0


def test_one_collective_each_way():
    counted = collectives.counted()["jnorm"]
    assert sum(counted["forward"].values()) == 1
    assert sum(counted["step"].values()) == 2


@pytest.mark.parametrize(("block", "form", "most"), [("batch norm + ReLU, jnorm", "native", 2), ("layer norm + ReLU, jnorm", "xla", 2)])
def test_a_block_of_a_deep_network_keeps_two_arrays(block, form, most):
    """Its input, and that of its product; a share of the float32 numbers per row of 128 values beside them. Flax's keep 3 and 4."""
    if form == "native" and not ours.has_native():
        pytest.skip("native kernels are not active")
    assert networks.marginal_temp(networks.blocks()[block], form, "float32", (512, 128)) <= most + 10 / 128


# --- the gate ---------------------------------------------------------------------------------------------------------------

TINY = {
    "batch_norm": (4, 3, 3, 32),
    "group_norm": (2, 3, 3, 64),
    "instance_norm": (2, 3, 3, 3),
    "layer_norm": (5, 8),
    "rms_norm": (2, 3, 8),
}


@pytest.mark.parametrize(("norm", "op"), OPERATIONS)
def test_the_oracle_differentiates_itself(norm, op):
    """Against central differences of Σ y·dy + Σ (x + residual)·ds in float64: with a step of 1e-6, wrong by about 1e-9."""
    case = case_of(norm, op, shape=TINY[norm])
    given = {k: v.astype(np.float64) for k, v in oracle.inputs(case).items()}
    wanted = oracle.expected(case, given)

    def loss(name, index, by):
        moved = given | {name: given[name].copy()}
        moved[name].flat[index] += by
        found = oracle.expected(case, moved)
        return (found["y"] * given["dy"]).sum() + ((found["sum"] * given["ds"]).sum() if op == "add" else 0)

    for name in [k for k in ("x", "residual", "scale", "bias") if f"d{k}" in wanted]:
        for index in (0, given[name].size // 2, given[name].size - 1):
            slope = (loss(name, index, 1e-6) - loss(name, index, -1e-6)) / 2e-6
            np.testing.assert_allclose(wanted[f"d{name}"].flat[index], slope, atol=1e-6)


@pytest.mark.parametrize("norm", cases.NORMS)
@pytest.mark.parametrize("name", [n for n in peers.JAX_PEERS if not n.startswith("jnorm")])
def test_every_peer_computes_the_norm(name, norm):
    if peers.missing([name]):
        pytest.skip(f"{name} is not installed")
    case = case_of(norm, shape=TINY[norm])
    given = oracle.inputs(case)
    peer = built(name, case)
    output = calling.step_program(case, peer, "one", calling.arguments(case, given, peer, {})).call()
    errors = oracle.errors(calling.results(case, peer, output), oracle.expected(case, given))
    assert max(errors.values()) < oracle.tolerance(case), errors


def test_torch_computes_the_norms():
    pytest.importorskip("torch")
    from benchmarks.peers.torch_process import TorchProcess

    process = TorchProcess("cpu")
    try:
        for norm, shape in TINY.items():
            case = case_of(norm, shape=shape)
            results, runs = process.prepare(case, "eager")
            assert runs["step"](2, 1) > 0
            errors = oracle.errors(results, oracle.expected(case, oracle.inputs(case)))
            assert max(errors.values()) < oracle.tolerance(case), (norm, errors)
        with pytest.raises(RuntimeError, match="KeyError"):
            process.time("compile", "step", 1, 0)
    finally:
        process.close()


def setting(names, **changes):
    return measure.Setting(names, 2, 1 << 25, 1e10, **changes)


def test_a_row():
    case = case_of("batch_norm", "act", shape=TINY["batch_norm"])
    row = measure.with_ratios(measure.measure(case, setting(["jnorm xla", "flax.linen", "torch eager"])))
    assert json.loads(json.dumps(row))["name"] == "batch_norm + relu 4×3×3×32 f32"
    assert row["peers"]["torch eager"] == {"left_out": "PyTorch is not installed"}
    mine, theirs = row["peers"]["jnorm xla"], row["peers"]["flax.linen"]
    assert mine["step"]["way"] == "one" and mine["step"]["rounds"] == 2
    assert set(theirs["trial"]) == {"forward", "one", "split", "dependent"}
    assert not mine["inexact"] and not theirs["inexact"]
    assert theirs["step"]["over"]["jnorm xla"]["ratio"] == pytest.approx(theirs["step"]["median"] / mine["step"]["median"])


def wrong(case, form):
    right = ours.unfused(case)
    return peers.Built(lambda affine, state, xs: (right(affine, state, xs)[0] * 1.001, state))


def test_jnorm_being_wrong_is_an_error(monkeypatch):
    monkeypatch.setattr(ours, "build", wrong)
    with pytest.raises(measure.GateFailure, match=r"layer_norm 5×8 f32, jnorm xla: errors .* allowed"):
        measure.measure(case_of("layer_norm", shape=(5, 8)), setting(["jnorm xla"]))


def test_a_peer_that_is_wrong_is_timed_and_marked(monkeypatch):
    from benchmarks.peers import flax_norms

    monkeypatch.setattr(flax_norms, "linen", lambda case: wrong(case, ""))
    row = measure.measure(case_of("layer_norm", shape=(5, 8)), setting(["flax.linen"], all_ways=False))
    assert row["peers"]["flax.linen"]["inexact"] and row["peers"]["flax.linen"]["step"]["median"] > 0


def test_a_peer_that_fails_is_left_out(monkeypatch):
    from benchmarks.peers import flax_norms

    def broken(case):
        raise AttributeError("gone\nfor good")

    monkeypatch.setattr(flax_norms, "linen", broken)
    row = measure.measure(case_of("layer_norm", shape=(5, 8)), setting(["flax.linen"]))
    assert row["peers"]["flax.linen"] == {"left_out": "AttributeError: gone"}


def test_errors_are_relative_and_what_is_not_finite_is_infinite():
    wanted = {"y": np.array([2.0, -4.0]), "dx": np.zeros(2)}
    assert oracle.errors({"y": np.array([2.0, -3.0]), "dx": np.zeros(2)}, wanted) == {"y": 0.25, "dx": 0.0}
    assert oracle.errors({"y": np.array([2.0, np.nan]), "dx": np.zeros(2)}, wanted)["y"] == np.inf


def test_tolerances_grow_with_what_is_around_the_norm():
    """float32 counts for little beside bfloat16's 2⁻⁹."""
    unit, shape = oracle.UNIT["bfloat16"], (64, 64)
    plain, add = (oracle.tolerance(Case("layer_norm", shape, "bfloat16", op), fused=True) for op in ("plain", "add"))
    silu = Case("group_norm", shape, "bfloat16", "act")
    assert [round(t / unit) for t in (plain, add, oracle.tolerance(silu), oracle.tolerance(silu, fused=True))] == [4, 6, 12, 4]


@pytest.mark.parametrize("loss", [2.001, float("nan")])
def test_networks_that_do_not_compute_the_same_are_an_error(loss):
    networks.check_losses("net", "float32", {"flax": 2.0, "jnorm, xla": 2.00001})
    networks.check_losses("net", "bfloat16", {"flax": 2.0, "jnorm, xla": 2.1})
    with pytest.raises(ValueError, match="the loss with jnorm, xla is"):
        networks.check_losses("net", "float32", {"flax": 2.0, "jnorm, xla": loss})

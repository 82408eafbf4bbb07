"""The benchmark's arithmetic, its command line, and what it reports of a run."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import __main__ as command
from benchmarks import (
    cases,
    claims,
    hlo,
    machine,
    options,
    peers,
    report,
    sections,
    timing,
)
from benchmarks.cases import Case
from benchmarks.peers import ours

# --- arithmetic -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "floors"),
    [
        (Case("batch_norm", (32, 56, 56, 64)), (3, 8)),
        (Case("batch_norm", (32, 56, 56, 64), op="add_act"), (4, 10)),
        (Case("layer_norm", (4096, 1024)), (2, 5)),
        (Case("rms_norm", (4096, 1024), op="add"), (4, 8)),
        (Case("group_norm", (32, 56, 56, 64), op="act"), (2, 5)),
        (Case("group_norm", (1, 512, 512, 64)), (3, 8)),  # 64 MiB, a sample that the cache does not hold
        (Case("instance_norm", (4, 128, 128, 64), "bfloat16"), (2, 5)),
    ],
)
def test_floor(case, floors):
    assert tuple(cases.floor(case, what, 32 << 20) for what in ("forward", "step")) == floors


def test_evaluation_reads_and_writes_once():
    assert cases.floor(Case("batch_norm", (8, 4), op="eval"), "forward", 1 << 20) == 2


@pytest.mark.parametrize(
    ("norm", "shape", "op", "message"),
    [
        ("layer_norm", (4, 4), "act", "no 'act' for 'layer_norm'"),
        ("group_norm", (4, 4, 100), "plain", "got 100"),
        ("instance_norm", (4, 4), "plain", "axis to reduce"),
    ],
)
def test_cases_that_cannot_be(norm, shape, op, message):
    with pytest.raises(ValueError, match=message):
        Case(norm, shape, op=op)


def test_suites():
    full, figures = (cases.every_case(suite, "cpu", 32 << 20) for suite in ("full", "figures"))
    assert len(set(full)) == len(full) and set(figures) <= set(full)
    assert {c.norm for c in full} == set(cases.NORMS) and {c.op for c in full} == set(cases.OPS)
    assert {c.dtype for c in full} == set(cases.BYTES)
    assert any(c.bytes > 32 << 20 for c in full if c.dtype == "bfloat16" and c.norm == "batch_norm")
    assert all(claims.target(dataclasses.asdict(c) | {"bytes": c.bytes}) for c in figures)
    assert Case("batch_norm", (256, 56, 56, 256)) in cases.every_case("full", "gpu", 50 << 20)


def test_select():
    all_cases = cases.every_case("full", "cpu", 32 << 20)
    assert {c.norm for c in cases.select(all_cases, ["rms_norm"], [], None, [])} == {"rms_norm"}
    found = cases.select(all_cases, ["rms_norm"], [], (7, 5), ["bfloat16"])
    assert found == [Case("rms_norm", (7, 5), "bfloat16")]


def test_machine(tmp_path):
    assert [machine.parse_size(s) for s in ("32K", "2M\n", "512", "1G")] == [32 << 10, 2 << 20, 512, 1 << 30]
    for i, (kind, level, size) in enumerate([("Data", 1, "32K"), ("Instruction", 1, "64K"), ("Unified", 3, "32768K")]):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert machine.caches(tmp_path) == {1: 32 << 10, 3: 32 << 20}
    assert machine.parse_steal("cpu  10 0 20 60 0 0 0 10 5 0\ncpu0 1 2\n") == (10, 100)
    assert machine.last_level_cache("gpu") > 0 and machine.cores() >= 1


def test_calls_for():
    assert timing.calls_for(1e-6) == timing.MOST_CALLS
    assert timing.calls_for(1e-3) == 4 and timing.calls_for(1) == 1


def test_bootstrap():
    ratio, low, high = timing.bootstrap_ratio([2.0] * 9, [1.0] * 9)
    assert (ratio, low, high) == (2, 2, 2)
    # What slows a whole round down cancels.
    noise = np.random.default_rng(0).uniform(1, 3, 9)
    ratio, low, high = timing.bootstrap_ratio([2.0 * n for n in noise], list(noise))
    assert ratio == low == high == 2
    a, b = (np.random.default_rng(seed).normal(mean, 0.1, 30) for seed, mean in ((1, 1.5), (2, 1.0)))
    ratio, low, high = timing.bootstrap_ratio(list(a), list(b))
    assert low < 1.5 < high and low < ratio < high
    assert timing.geometric_mean([1, 4, 16]) == pytest.approx(4)


def test_rounds_are_interleaved_and_those_with_steal_dropped(monkeypatch):
    # Of 100 ticks in the second round, 10 are stolen.
    readings = iter([(0, 0), (0, 100), (0, 100), (10, 200), (10, 200), (10, 300)])
    monkeypatch.setattr(machine, "steal", lambda: next(readings))
    order = []
    variants = {name: lambda calls, warm, name=name: order.append(name) or float(len(order)) for name in "ab"}
    times, dropped = timing.interleave(variants, 2, {"a": 1.0, "b": 1.0})
    assert order == ["a", "b", "b", "a", "a", "b"]  # each round begins with another
    assert times == {"a": [1, 5], "b": [2, 6]} and dropped == 1


def test_too_much_steal_is_an_error(monkeypatch):
    ticks = iter(range(0, 10**6, 100))
    monkeypatch.setattr(machine, "steal", lambda: (next(ticks),) * 2)
    with pytest.raises(RuntimeError, match="every round"):
        timing.interleave({"a": lambda calls, warm: 1.0}, 3, {"a": 1.0})


PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %n = f32[4,8]{1,0} negate(%p)
}

ENTRY %main.1 (x: f32[4,8], s: bf16[8]) -> (f32[4,8], f32[8]) {
  %x = f32[4,8]{1,0} parameter(0), metadata={op_name="x"}
  %s = bf16[8]{0} parameter(1)
  %fusion = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %start = f32[8]{0} all-reduce-start(%s), to_apply=%add
  %done = f32[8]{0} all-reduce-done(%start)
  %call = (f32[4,8]{1,0}, /*index=1*/f32[8]{0}) custom-call(%fusion, %fusion, %done), custom_call_target="f"
  %first = f32[4,8]{1,0} get-tuple-element(%call), index=0
  ROOT %t = (f32[4,8]{1,0}, f32[8]{0}) tuple(%first, %done)
}
"""


def test_programs_are_counted():
    """fusion: 128 + 128 bytes; all-reduce: 16 + 32; custom call: (128 + 32) + 128 + 32, one operand twice but read once."""
    assert hlo.count(PROGRAM) == hlo.Program(3, 256 + 48 + 320, {"all-reduce": 1})


def test_a_compiled_program_is_counted():
    x = jax.numpy.ones((64, 64))
    found = hlo.count(jax.jit(lambda x: jax.numpy.sin(x) + 1).lower(x).compile().as_text())
    assert (found.kernels, found.bytes, found.collectives) == (1, 2 * x.nbytes, {})


# --- the report -------------------------------------------------------------------------------------------------------------


def peer(seconds, over=None, inexact=False):
    timed = {"median": seconds, "min": seconds, "of_limit": 0.5, "way": "one", "times": [seconds] * 3}
    if over:
        timed["over"] = {"jnorm xla": dict(zip(("ratio", "low", "high", "minima"), (*over, 1.0), strict=True))}
    memory = {"residuals": 1.0, "step": {"temp": 0.0, "peak": 4.0, "kernels": 9, "traffic": 8.0}}
    return {"step": timed, "forward": timed, "inexact": inexact, "memory": memory, "errors": {"y": 1e-6}, "trial": {}}


@pytest.fixture
def found():
    """A run in which jnorm is 2 times as fast as Linen, surely slower than Haiku, and perhaps slower than PyTorch."""
    case = Case("batch_norm", (32, 56, 56, 64))
    others = {"flax.linen": peer(2, (2, 1.9, 2.1)), "haiku": peer(0.8, (0.8, 0.7, 0.9), True), "torch eager": peer(0.9, (0.9, 0.8, 1.2))}
    row = dataclasses.asdict(case) | {"name": case.name, "bytes": case.bytes, "rounds_dropped": 1, "tolerance": 1e-5}
    row["bandwidth"] = {"own_size": 3e10, "memory": 2e10, "used": "own_size"}
    row["peers"] = {"jnorm native": {"left_out": "none"}, "jnorm xla": peer(1, (1, 1, 1)), **others, "keras": {"left_out": "gone"}}
    about = machine.describe(jax.devices()) | {"processor": "a processor", "commit": "abc"}
    bandwidths = {"before": {"best": 2e10}, "after": {"best": 2.1e10}}
    even = dict.fromkeys(("ratio", "low", "high"), 1.0)
    seconds = {"flax": 3, "jnorm, xla": 2, "none": 1}
    variants = {k: timing.summary([s] * 3) | {"share": 1 - 1 / s, "over_flax": even, "peak": 1 << 20} for k, s in seconds.items()}
    run = {"machine": about, "kernels": ours.status(), "missing": ["equinox"], "peers": list(row["peers"]), "rounds": 3, "rows": [row],
           "networks": [{"network": "net", "dtype": "float32", "rounds_dropped": 0, "variants": variants}], "failures": [],
           "stacks": [{"block": "b", "dtype": "float32", "shape": [2, 2], "marginal_temp": 2.0}],
           "collectives": {"jnorm": {"forward": {"all-gather": 1}, "step": {}}}, "memory_bandwidth": bandwidths}  # fmt: skip
    return {"retained": run}


def test_losses_are_listed(found):
    listed = sections.losses(found["retained"], "jnorm xla")
    assert [(one["peer"], one["what"], one["clear"]) for one in listed] == [
        ("haiku", "step", True), ("haiku", "forward", True), ("torch eager", "step", False), ("torch eager", "forward", False),
    ]  # fmt: skip


def test_markdown(found):
    text = report.markdown(found)
    assert "| batch_norm 32×56×56×64 f32 | 1e+03 | 1e+03 | 50% | 2.00 | (0.80) | 0.90 | – |" in text
    assert "4 of 6 comparisons, of which 2 are certain" in text
    assert "| batch_norm 32×56×56×64 f32, step | Haiku (inexact) | 0.80 | 0.70–0.90 | slower |" in text
    assert "Missing, so not compared: equinox" in text and "commit abc" in text and "1 rounds dropped" in text
    assert "| step, Linen | one | 2e+03 | 2e+03 | 2.00 | 1.90–2.10 | 1.00 | 50% | 1e-06 |" in text
    assert "| Linen, step, f32 | 2.00 | 1 | 2.00 | batch_norm 32×56×56×64 f32 |" in text
    assert "| batch_norm 32×56×56×64 f32 | 2 yes | 0.9 no | 50% no | 2 yes | 0.9 no | 1 yes | – | 0.5 yes |" in text


@pytest.mark.parametrize("failures", [[], ["layer_norm: wrong"]])
def test_the_command_reports_what_was_measured_and_fails_where_jnorm_is_wrong(found, failures, tmp_path, monkeypatch, capsys):
    found["retained"]["failures"] = failures
    (tmp_path / "run.json").write_text(json.dumps(found))
    (tmp_path / "images").mkdir()
    outputs = ["--markdown", str(tmp_path / "t.md"), "--png", str(tmp_path / "p.png"), "--page", str(tmp_path / "page.md")]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--from-json", str(tmp_path / "run.json"), *outputs])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == bool(failures)
    assert (tmp_path / "p.png").stat().st_size > 10_000 and (tmp_path / "t.md").read_text() == report.markdown(found)
    assert (tmp_path / "page.md").read_text().endswith(report.markdown(found)) and (tmp_path / "images" / "benchmarks.png").exists()
    printed = capsys.readouterr()
    assert "Where jnorm is slower" in printed.out
    assert ("WRONG: retained: layer_norm: wrong" in printed.err) == bool(failures)


def parsed(*arguments):
    return options.parser("").parse_args(arguments)


def test_command_line():
    request = options.request_of(parsed("--norm", "batch_norm", "--shape", "32,56,56,64", "--dtype", "f32", "--peers", "flax"))
    assert (request.shape, request.dtypes, request.only, request.rounds) == ((32, 56, 56, 64), ["float32"], ["cases"], 9)
    assert options.request_of(parsed()).only == list(options.PARTS)
    assert options.request_of(parsed("--quick")).rounds == 3 and "torch compile" not in options.request_of(parsed("--quick")).peers
    assert options.allocators(parsed()) == ("retained", "default") and options.allocators(parsed("--quick")) == ("retained",)
    assert peers.chosen(["flax"]) == ["jnorm native", "jnorm xla", "flax.linen", "flax.linen slow variance", "flax.nnx"]
    with pytest.raises(ValueError, match="no peer begins with numpy"):
        peers.chosen(["numpy"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--norm", "nope"], "no nope; there are batch_norm"), (["--shape", "3,x"], "a shape is like"), (["--dtype", "f64"], "f32, bf16")],
)
def test_bad_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parsed(*arguments)
    assert message in capsys.readouterr().err


def test_the_command_of_a_run():
    arguments = ["--suite", "figures", "--json", "run.json", "--allocator", "both", "--page", "docs/benchmarks.md", "--one-way"]
    assert command.command_of(arguments, "default") == "--allocator default --suite figures --one-way"

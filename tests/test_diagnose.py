"""The example that finds out why an evaluation is bad: what it trains is, it says why, and it cures it."""

import json
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import diagnose


@pytest.fixture(autouse=True)
def as_a_program_of_its_own():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def check(result, kinds, gap):
    before, after, report = result["before"], result["after"], result["report"]
    assert before["training"] - before["evaluation"] > gap
    assert after["evaluation"] > before["training"] - 0.05
    assert after["test"] - before["test"] > gap
    assert after["training"] == before["training"]  # a batch's own statistics are the same
    assert {finding.kind for layer in report.layers for finding in layer.findings} == kinds
    assert "is due to the norms" in report.verdict and "Most is due to 'norm'" in report.verdict


def test_quick(tmp_path, capsys):
    """One epoch of a momentum of 0.99: most of what the averages hold is still what they started as."""
    result = diagnose.main(["--quick", "--plot", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")])
    check(result, {"initial values"}, gap=0.1)
    for layer in result["report"].layers:
        assert layer.initial == pytest.approx(0.99**22, abs=0.05)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert [layer["path"] for layer in json.loads((tmp_path / "a.json").read_text())["layers"]] == [a.path for a in result["report"].layers]
    printed = capsys.readouterr().out
    assert "initial values" in printed and "recalibrated" in printed and "22/22" in printed


@pytest.mark.slow
@pytest.mark.parametrize("cause, kind, gap", [("momentum", "initial values", 0.3), ("contrast", "other data", 0.5)])
def test_causes(cause, kind, gap, tmp_path):
    result = diagnose.main(["--cause", cause, "--plot", str(tmp_path / "a.png")])
    check(result, {kind}, gap)
    if cause == "contrast":
        assert [layer.path for layer in result["report"].layers if layer.findings] == ["norm"]  # the first alone


def test_a_plot_that_is_a_directory(tmp_path):
    with pytest.raises(SystemExit, match="is a directory"):
        diagnose.main(["--plot", str(tmp_path)])

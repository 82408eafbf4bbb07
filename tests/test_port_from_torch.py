"""The example ports a network from PyTorch: equal outputs and statistics, before and after folding, and equal accuracies."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is an optional test dependency")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import port_from_torch

# Two programs of seven layers, whose longest sums have 512 terms, may differ by some √512 roundings each. Logits are of order ten.
DIFFERENCE = 7 * 512**0.5 * 2**-24 * 10


@pytest.mark.slow
def test_the_example():
    with jax.numpy_dtype_promotion("standard"):
        report = port_from_torch.main(["--quick", "--repeats", "1"])
    assert max(report.evaluation, report.folding) < DIFFERENCE
    assert report.statistics < DIFFERENCE
    assert len(set(report.accuracies.values())) == 1 and min(report.accuracies.values()) > 0.9
    assert report.seconds.keys() == report.accuracies.keys()
    assert all(0 < seconds < np.inf for seconds in report.seconds.values())


def test_without_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"PyTorch is not installed: pip install 'jnorm\[torch\]'"):
        port_from_torch.main(["--quick"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--epochs", "0"], "--epochs: '0' is not a positive integer"),
        (["--epochs", "x"], "--epochs: 'x' is not a positive integer"),
    ],
    ids=["batch-size", "epochs", "word"],
)
def test_bad_arguments(arguments, told, capsys):
    with pytest.raises(SystemExit):
        port_from_torch.main(arguments)
    assert told in capsys.readouterr().err


def test_a_batch_of_more_than_there_is():
    with pytest.raises(SystemExit, match="--batch-size must be at most"):
        port_from_torch.main(["--batch-size", "5000"])

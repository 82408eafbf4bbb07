"""The code in README.md and CONTRIBUTING.md runs as it stands, and does what it says."""

import re
import textwrap
from pathlib import Path

import jax
import numpy as np

import jnorm

ROOT = Path(__file__).parent.parent
IMPORTS = """
import functools
import jax.numpy as jnp
from jnorm._pipeline.arguments import Across, broadcast_mask, check_affine, check_dtype, check_epsilon, check_x
from jnorm._pipeline.axes import Layout, canonical_axes, others
from jnorm._pipeline.normalize import affine, run
from jnorm._stats import inverse_sqrt
"""


def blocks(name, language):
    return [textwrap.dedent(b) for b in re.findall(rf"^ *```{language}\n(.*?)^ *```$", (ROOT / name).read_text(), re.M | re.S)]


def test_readme_train_step():
    step, modules = blocks("README.md", "python")
    names = {}
    exec(step + modules, names)
    variables = names["Block"]().init(jax.random.key(0), names["x"], train=True)
    assert set(variables["batch_stats"]) == {"BatchNorm_0"} and names["norm"](names["x"]).shape == (32, 8)
    params, state, first, x, target = (names[k] for k in ("params", "state", "value", "x", "target"))
    for _ in range(20):
        params, state, value = names["train_step"](params, state, x, target)
    assert value < first / 2
    assert set(state) == {"mean", "var"}


def test_readme_has_two_commands():
    commands = blocks("README.md", "bash")
    assert len(commands) == 2 and all(len(c.splitlines()) == 1 for c in commands)
    assert "examples/train_digits.py" in commands[0] and "pytest" in commands[1]


def test_readme_lists_every_function():
    table = (ROOT / "README.md").read_text()
    assert not [name for name in jnorm.__all__ if name != "Stats" and f"`{name}" not in table]


def test_contributing_adds_a_norm():
    (code,) = blocks("CONTRIBUTING.md", "python")
    names = {}
    exec(IMPORTS + code, names)
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(6, 3, 4)).astype(np.float32) + 1, rng.normal(size=4).astype(np.float32)
    mask = rng.random(size=(6, 3, 1)) < 0.7
    wide = x.astype(np.float64)
    mean_square = (wide**2 * mask).sum((0, 1)) / mask.sum()
    # 18 terms of rounding error each, in a sum of var and mean².
    np.testing.assert_allclose(
        names["channel_rms_norm"](x, scale, mask=mask), wide / np.sqrt(mean_square + 1e-6) * scale, rtol=(18 + 16) * 2.0**-24
    )

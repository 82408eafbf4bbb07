"""Several processes with jax.distributed, as on several hosts, give the answer of one device on the concatenated batch.

Each launch runs its checks (multihost_worker.py) in all processes, each of which compares with the oracle by itself.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pairwise import every_other

ROOT = Path(__file__).parent.parent
WORKER = ROOT / "tests" / "multihost_worker.py"
CHECKS = [
    f.name
    for f in ast.parse(WORKER.read_text()).body
    if isinstance(f, ast.FunctionDef) and any(getattr(d, "id", None) == "check" for d in f.decorator_list)
]
LAYOUTS = {"two of two devices": (2, 2), "four of one device": (4, 1)}
# Every check in one of the layouts; those over which most is merged in both.
BOTH = ("shard_map_batch_norm", "jit_batch_norm")
FAST = {
    "two of two devices": [name for i, name in enumerate(CHECKS) if name in BOTH or i % 4],
    "four of one device": [name for i, name in enumerate(CHECKS) if name in BOTH or not i % 4],
}


def launch(*arguments, timeout=110, **env):
    """Runs launch_local.py; a hang is ended by it, and fails with what the processes printed."""
    command = [sys.executable, "examples/launch_local.py", "--timeout", timeout, *arguments]
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, **env}, text=True, capture_output=True, timeout=timeout + 30, check=False
    )


def run_checks(layout, names, folder, **env):
    processes, devices = LAYOUTS[layout]
    ended = launch("--processes", processes, "--devices-per-process", devices, WORKER, folder, *names, **env)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = [json.loads((folder / f"{i}.json").read_text()) for i in range(processes)]
    assert all(list(result) == names for result in results)
    failed = [f"{name} in process {i}:\n{why}" for i, result in enumerate(results) for name, why in result.items() if why]
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("layout", every_other(LAYOUTS))
def test_answer_of_one_device(layout, tmp_path):
    run_checks(layout, FAST[layout], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("env", [{}, {"JNORM_KERNELS": "xla"}], ids=["default", "xla"])
@pytest.mark.parametrize("half", [0, 1])  # in time, for four processes on two cores
@pytest.mark.parametrize("layout", LAYOUTS)
def test_answer_of_one_device_in_all(layout, half, env, tmp_path):
    run_checks(layout, CHECKS[half::2], tmp_path, **env)

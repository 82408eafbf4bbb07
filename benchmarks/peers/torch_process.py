"""The other end of torch_worker's pipe."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from .. import machine
from ..cases import Case
from ..timing import Timed


class TorchProcess:
    def __init__(self, platform: str) -> None:
        passive = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(machine.cores()), "JNORM_BENCHMARK_PLATFORM": platform}
        command = [sys.executable, "-m", "benchmarks.peers.torch_worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=machine.ROOT, env={**os.environ, **passive}
        )
        self.about = self.ask("hello")

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process of PyTorch ended"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def prepare(self, case: Case, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Timed]]:
        """What it computes, and its runs: "forward" and, for what trains, "step"."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "results.npz")
            self.ask("prepare", case=dataclasses.asdict(case), kind=kind, results=path)
            with np.load(path) as found:
                results = dict(found)
        return results, {what: functools.partial(self.time, kind, what) for what in ("forward", *(["step"] if case.trains else []))}

    def time(self, kind: str, what: str, calls: int, warm: int) -> float:
        return self.ask("time", kind=kind, what=what, calls=calls, warm=warm)["seconds"]

    def clear(self) -> None:
        self.ask("clear")

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(timeout=30)

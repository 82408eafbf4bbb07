"""PyTorch, in a process of its own, which another one tells what to run: `python -m benchmarks.peers.torch_worker`.

A line of JSON in, a line of JSON out. Its threads wait passively, so that they do not take the other process's cores between rounds. Images
are channels-last tensors; parameters are float32 for batch norm, as under autocast, and of x's dtype elsewhere.
"""

import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import machine, oracle
from ..cases import MOMENTUM, ROW_NORMS, Case
from ..timing import timed

torch: Any = importlib.import_module("torch")
F: Any = importlib.import_module("torch.nn.functional")


class Session:
    """The case that is being measured."""

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() and os.environ.get("JNORM_BENCHMARK_PLATFORM") != "cpu" else "cpu"
        torch.set_num_threads(machine.cores())
        self.runs: dict[tuple[str, str], Callable[[], Any]] = {}

    def hello(self) -> dict[str, Any]:
        return {"version": torch.__version__, "threads": torch.get_num_threads(), "device": self.device}

    def prepare(self, case: dict[str, Any], kind: str, results: str) -> dict[str, Any]:
        """Writes what it computes to the file `results`, compares nothing itself."""
        self.case = Case(**{**case, "shape": tuple(case["shape"])})
        torch._dynamo.reset()
        given = {k: self.place(k, v) for k, v in oracle.inputs(self.case).items()}
        norm = torch.compile(norm_of(self.case), dynamic=False) if kind == "compile" else norm_of(self.case)
        for what, run in programs(self.case, norm, given).items():
            self.runs[kind, what] = run
        output = self.runs[kind, "step" if self.case.trains else "forward"]()
        computed: dict[str, Any] = {k: to_numpy(self.case, v) for k, v in named(self.case, output).items()}
        np.savez(results, **computed)
        return {}

    def place(self, name: str, a: np.ndarray) -> Any:
        dtype = getattr(torch, self.case.dtype)
        t = torch.from_numpy(a).to(self.device)
        if name in ("mean", "var") or (name in ("scale", "bias") and self.case.norm == "batch_norm"):
            return t.requires_grad_(name in ("scale", "bias"))
        t = t.to(dtype)
        if a.ndim > 2 and self.case.norm not in ROW_NORMS:
            t = t.movedim(-1, 1)  # a view: in memory, channels stay last
        return t.requires_grad_(name in ("scale", "bias", "x") or (name == "residual" and self.case.op == "add_act"))

    def time(self, kind: str, what: str, calls: int, warm: int) -> dict[str, float]:
        wait = (lambda _: torch.cuda.synchronize()) if self.device == "cuda" else (lambda _: None)
        return {"seconds": timed(self.runs[kind, what], wait)(calls, warm)}

    def clear(self) -> dict[str, Any]:
        self.runs.clear()
        return {}


def norm_of(case: Case) -> Callable:
    """(x, residual, scale, bias, mean, var) -> y or (y, x + residual)."""
    activate = {"relu": F.relu, "silu": F.silu, None: lambda y: y}[case.activation]

    def norm(x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> Any:
        match case.norm:
            case "batch_norm":
                return F.batch_norm(x, mean, var, scale, bias, case.trains, 1 - MOMENTUM, case.epsilon)
            case "layer_norm":
                return F.layer_norm(x, (case.channels,), scale, bias, case.epsilon)
            case "rms_norm":
                return F.rms_norm(x, (case.channels,), scale, case.epsilon)
            case "group_norm":
                return F.group_norm(x, case.groups, scale, bias, case.epsilon)
            case _:
                return F.instance_norm(x, weight=scale, bias=bias, eps=case.epsilon)

    def around(x: Any, residual: Any, *rest: Any) -> Any:
        if case.op == "add":
            total = x + residual
            return norm(total, *rest), total
        y = norm(x, *rest)
        return activate(y + residual if case.op == "add_act" else y)

    return around


def programs(case: Case, norm: Callable, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    arguments = [given.get(k) for k in ("x", "residual", "scale", "bias", "mean", "var")]
    varied = [given[k] for k in ("x", "residual", "scale", "bias") if k in given and given[k].requires_grad]
    if not case.has_bias:
        varied = [v for v in varied if v is not given["bias"]]
    cotangents = [given[k] for k in ("dy", "ds") if k in given]

    def evaluate() -> Any:
        with torch.no_grad():
            return norm(*arguments)

    def step() -> Any:
        out = norm(*arguments)
        return out, torch.autograd.grad(out, varied, cotangents if case.op == "add" else cotangents[0])

    # The forward pass of training, which keeps what the backward pass needs.
    return {"forward": lambda: norm(*arguments), "step": step} if case.trains else {"forward": evaluate}


def named(case: Case, output: Any) -> dict[str, Any]:
    """The oracle's names."""
    if not case.trains:
        return {"y": output}
    out, gradients = output
    names = ["dx", *(["dresidual"] if case.op == "add_act" else []), "dscale", *(["dbias"] if case.has_bias else [])]
    found = {"y": out[0], "sum": out[1]} if case.op == "add" else {"y": out}
    return found | dict(zip(names, gradients, strict=True))


def to_numpy(case: Case, t: Any) -> np.ndarray:
    t = t.detach().float().cpu()
    return (t.movedim(1, -1) if t.ndim > 2 and case.norm not in ROW_NORMS else t).numpy()


def main() -> None:
    warnings.filterwarnings("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a compiler that prints must not answer for us
    session = Session()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(session, command.pop("do"))(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else traceback.format_exc(limit=-1)}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

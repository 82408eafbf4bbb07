"""What is measured: a norm, what stands around it, a shape, a dtype."""

import dataclasses
import math
from collections.abc import Iterable

GROUPS = 32
EPSILON = {"batch_norm": 1e-5}
DEFAULT_EPSILON = 1e-6
MOMENTUM = 0.99
BYTES = {"float32": 4, "bfloat16": 2}
DTYPES = {"f32": "float32", "bf16": "bfloat16"}

# plain: the norm. act: an activation after it. add_act: a residual, then an activation. add: (norm(x + residual), x + residual).
# eval: with running statistics, forward only.
OPS = ("plain", "act", "add_act", "add", "eval")
NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")
ROW_NORMS = ("layer_norm", "rms_norm")
ACTIVATION = {"batch_norm": "relu", "group_norm": "silu"}


@dataclasses.dataclass(frozen=True)
class Case:
    norm: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    op: str = "plain"

    def __post_init__(self) -> None:
        supported = {"plain": NORMS, "act": tuple(ACTIVATION), "add_act": ("batch_norm",), "add": ROW_NORMS, "eval": ("batch_norm",)}
        if self.norm not in supported[self.op]:
            raise ValueError(f"the benchmark has no {self.op!r} for {self.norm!r}, only for {', '.join(supported[self.op])}")
        if self.norm == "group_norm" and self.shape[-1] % GROUPS:
            raise ValueError(f"group_norm in {GROUPS} groups needs channels that {GROUPS} divides, got {self.shape[-1]}")
        if self.norm == "instance_norm" and len(self.shape) < 3:
            raise ValueError(f"instance_norm needs an axis to reduce between the first and the last, got {self.shape}")

    @property
    def name(self) -> str:
        op = {"plain": "", "act": f" + {self.activation}", "add_act": f" + add + {self.activation}", "add": ", added residual"}
        return f"{self.norm}{op.get(self.op, ' in evaluation')} {'×'.join(map(str, self.shape))} {short(self.dtype)}"

    @property
    def activation(self) -> str | None:
        return ACTIVATION[self.norm] if self.op in ("act", "add_act") else None

    @property
    def has_residual(self) -> bool:
        return self.op in ("add", "add_act")

    @property
    def has_bias(self) -> bool:
        return self.norm != "rms_norm"

    @property
    def trains(self) -> bool:
        return self.op != "eval"

    @property
    def epsilon(self) -> float:
        return EPSILON.get(self.norm, DEFAULT_EPSILON)

    @property
    def channels(self) -> int:
        return self.shape[-1]

    @property
    def bytes(self) -> int:
        """X: the bytes of x."""
        return math.prod(self.shape) * BYTES[self.dtype]

    @property
    def groups(self) -> int:
        return GROUPS if self.norm == "group_norm" else self.channels


def short(dtype: str) -> str:
    return {"float32": "f32", "bfloat16": "bf16"}[dtype]


def floor(case: Case, what: str, cache: int) -> int:
    """The fewest bytes that `what`, "forward" or "step", can move, in X: every x-sized array that must be read or written, counted once
    a pass.

    Batch norm needs two passes over x each way. A row, or a sample that fits the cache, is read once each way.
    """
    if case.op == "eval":
        return 2
    one_pass = case.norm in ROW_NORMS or (case.norm != "batch_norm" and case.bytes // case.shape[0] <= cache)
    forward, backward = (2, 3) if one_pass else (3, 5)
    # The residual is read, and x + residual written, both ways; after an activation, the residual's own gradient is written.
    extra = {"add": (2, 1), "add_act": (1, 1)}.get(case.op, (0, 0))
    forward, backward = forward + extra[0], backward + extra[1]
    return {"forward": forward, "step": forward + backward}[what]


# --- which cases ------------------------------------------------------------------------------------------------------------

FIGURES = {
    "batch_norm": [(32, 56, 56, 64), (128, 56, 56, 64), (32, 14, 14, 1024)],
    "layer_norm": [(4096, 1024), (16384, 1024), (4096, 4096), (8, 128), (64, 768)],
    "rms_norm": [(4096, 1024), (16384, 1024), (4096, 4096), (8, 128), (64, 768)],
    "group_norm": [(32, 56, 56, 64), (64, 64, 64, 128)],
}
# (the batch on a CPU, the batch on an accelerator, the rest of the shape)
RESNET50 = [(32, 256, 112, 112, 64), (32, 256, 56, 56, 256), (32, 256, 28, 28, 128), (32, 256, 28, 28, 512), (32, 256, 14, 14, 256),
            (32, 256, 7, 7, 512), (32, 256, 7, 7, 2048)]  # fmt: skip
VIT = [(16, 256, 197, 768), (16, 256, 197, 1024)]
CONVNEXT = [(16, 128, 56, 56, 96)]
LLM = [(4096, 16384, 4096), (4096, 16384, 8192)]
UNET = [(2, 16, 64, 64, 320), (2, 16, 32, 32, 640), (2, 16, 16, 16, 1280), (2, 16, 8, 8, 1280)]
VAE = [(1, 4, 256, 256, 128)]
NETWORKS = {
    "batch_norm": RESNET50,
    "layer_norm": [*VIT, *CONVNEXT, *LLM],
    "rms_norm": LLM,
    "group_norm": [*UNET, *VAE],
    "instance_norm": [(4, 16, 128, 128, 64), (1, 4, 256, 256, 32)],
}
AWKWARD = {
    "batch_norm": [(8, 128), (64, 768), (32, 64, 64, 3), (64, 1000, 17), (32, 32, 32, 100), (1, 56, 56, 64)],
    "layer_norm": [(1, 1024), (20000, 3), (8192, 17), (8192, 100)],
    "rms_norm": [(1, 1024), (8192, 100)],
    "group_norm": [(1, 16, 16, 64), (8, 128)],
    "instance_norm": [(2, 64, 64, 3), (8, 32, 32, 100)],
}
AROUND = [
    ("batch_norm", "act", (32, 256, 56, 56, 64)),
    ("batch_norm", "act", (32, 256, 14, 14, 256)),
    ("batch_norm", "add_act", (32, 256, 56, 56, 256)),
    ("batch_norm", "add_act", (32, 256, 14, 14, 1024)),
    ("batch_norm", "eval", (32, 256, 56, 56, 64)),
    ("batch_norm", "eval", (32, 256, 14, 14, 1024)),
    ("group_norm", "act", UNET[0]),
    ("group_norm", "act", UNET[1]),
    ("layer_norm", "add", VIT[0]),
    ("layer_norm", "add", (4096, 16384, 1024)),
    ("rms_norm", "add", LLM[0]),
]
QUICK = [
    Case("batch_norm", (8, 28, 28, 64)),
    Case("batch_norm", (8, 28, 28, 64), op="act"),
    Case("layer_norm", (1024, 1024)),
    Case("layer_norm", (1024, 1024), op="add"),
    Case("rms_norm", (64, 768), "bfloat16"),
    Case("group_norm", (4, 28, 28, 64), "bfloat16"),
]


def placed(shape: tuple[int, ...], platform: str) -> tuple[int, ...]:
    """A shape with two batch sizes, for this platform."""
    return (shape[0 if platform == "cpu" else 1], *shape[2:])


def larger_than(cache: int) -> tuple[int, ...]:
    """A batch norm whose x, in two bytes a value, is twice the last-level cache."""
    return (max(1, -(-2 * cache // (56 * 56 * 64 * 2))), 56, 56, 64)


def every_case(suite: str, platform: str, cache: int) -> list[Case]:
    """The cases of "quick", "figures" or "full", each once."""
    if suite == "quick":
        return QUICK
    plain = [(norm, "plain", shape) for norm, shapes in FIGURES.items() for shape in shapes]
    if suite == "full":
        plain += [(norm, "plain", placed(shape, platform)) for norm, shapes in NETWORKS.items() for shape in shapes]
        plain += [(norm, "plain", shape) for norm, shapes in AWKWARD.items() for shape in shapes]
        plain += [("batch_norm", "plain", larger_than(cache))]
        plain += [(norm, op, placed(shape, platform)) for norm, op, shape in AROUND]
    cases = dict.fromkeys(Case(norm, shape, dtype, op) for norm, op, shape in plain for dtype in BYTES)
    return sorted(cases, key=lambda c: (NORMS.index(c.norm), OPS.index(c.op)))


def select(cases: Iterable[Case], norms: list[str], ops: list[str], shape: tuple[int, ...] | None, dtypes: list[str]) -> list[Case]:
    """The cases that were asked for; a shape that is in no suite makes its own cases, of the norms and operations asked for."""
    found = [c for c in cases if (not norms or c.norm in norms) and (not ops or c.op in ops) and (not dtypes or c.dtype in dtypes)]
    if shape is None:
        return found
    return [Case(norm, shape, dtype, op) for norm in norms or NORMS for op in ops or ["plain"] for dtype in dtypes or list(BYTES)]

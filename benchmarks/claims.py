"""What is claimed of the shapes in `cases.FIGURES`, and what a run says of it."""

import dataclasses
from typing import Any

from .cases import FIGURES

FLAX = ("flax.linen", "flax.linen slow variance", "flax.nnx")
TORCH = ("torch eager", "torch compile")
TEMP_LIMIT = 0.05
RESIDUAL_LIMIT = 1.05  # x, and numbers per channel, row or sample and channel
XLA_LIMIT = 1.05
XLA_LIMITS = {("layer_norm", "float32"): 1.15}
SMALL = 1 << 18  # bytes: below, the time is that of a call


@dataclasses.dataclass(frozen=True)
class Target:
    """A step: times as fast as Flax at its best and as PyTorch, and the share of the bandwidth limit; 0 where nothing is claimed."""

    flax: float
    torch: float
    limit: float


ROWS = {"float32": Target(3.5, 1.2, 0.70), "bfloat16": Target(4.5, 1.2, 0.50)}
TARGETS = {
    "batch_norm": {"float32": Target(1.85, 1.3, 0.90), "bfloat16": Target(4, 1.3, 0.80)},
    "batch_norm wide": {"float32": Target(1.5, 1.1, 0.65), "bfloat16": Target(2.5, 1.1, 0.50)},
    "layer_norm": ROWS,
    "rms_norm": ROWS,
    "group_norm": {"float32": Target(5, 2, 0.65), "bfloat16": Target(9, 2, 0.50)},
}


def target(row: dict[str, Any]) -> Target | None:
    """None for a row that nothing is claimed of."""
    shape = tuple(row["shape"])
    if row["op"] != "plain" or shape not in FIGURES.get(row["norm"], []):
        return None
    if row["bytes"] < SMALL:
        return Target(1, 0, 0)
    return TARGETS["batch_norm wide" if row["norm"] == "batch_norm" and shape[-1] == 1024 else row["norm"]][row["dtype"]]


def fastest(row: dict[str, Any], names: tuple[str, ...], what: str, form: str) -> dict[str, Any] | None:
    """The ratio of the fastest of `names` to `form`, and its name; None where none of them ran."""
    there = {n: row["peers"][n][what] for n in names if what in row["peers"].get(n, {})}
    if not there:
        return None
    name = min(there, key=lambda n: there[n]["median"])
    return {"name": name, **there[name]["over"][form]}


def headline(run: dict[str, Any]) -> str | None:
    """The form of jnorm that a run is about: native where that ran."""
    for form in ("jnorm native", "jnorm xla"):
        if any("left_out" not in row["peers"].get(form, {"left_out": ""}) for row in run["rows"]):
            return form
    return None


def judged(row: dict[str, Any], form: str) -> dict[str, tuple[float, bool]] | None:
    """{claim: (what was measured, whether the claim holds)} for a row that claims are made of."""
    wanted, mine = target(row), row["peers"].get(form, {})
    if wanted is None or "step" not in mine:
        return None
    found: dict[str, tuple[float, bool]] = {}
    for label, names, least in (("Flax", FLAX, wanted.flax), ("PyTorch", TORCH, wanted.torch)):
        for what in ("step", "forward"):
            ratio = fastest(row, names, what, form)
            if ratio and (least or what == "forward") and not (label == "PyTorch" and not least):
                found[f"{what}, {label}"] = (ratio["ratio"], ratio["ratio"] >= (least if what == "step" else 1))
    if wanted.limit:
        found["of the limit"] = (mine["step"]["of_limit"], mine["step"]["of_limit"] >= wanted.limit)
        memory = mine["memory"]
        found["residuals / x"] = (memory["residuals"], memory["residuals"] <= RESIDUAL_LIMIT)
        if form == "jnorm native":
            found["temporaries / x"] = (memory["step"]["temp"], memory["step"]["temp"] <= TEMP_LIMIT)
    plain = fastest(row, FLAX, "step", "jnorm xla") if "step" in row["peers"].get("jnorm xla", {}) else None
    if plain:
        most = XLA_LIMITS.get((row["norm"], row["dtype"]), XLA_LIMIT)
        found["XLA form, time / Flax's"] = (1 / plain["ratio"], 1 / plain["ratio"] <= most)
    return found

"""The tables of a run, as data."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from . import claims
from .cases import short
from .timing import geometric_mean

NAMES = {"flax.linen": "Linen", "flax.linen slow variance": "Linen, slow var", "flax.nnx": "NNX", "haiku": "Haiku", "equinox": "Equinox",
         "keras": "Keras", "torch eager": "PyTorch", "torch compile": "PyTorch compiled"}  # fmt: skip
NOTHING = "–"
DETAILED = 2  # with so few cases, all is shown of each


@dataclasses.dataclass
class Section:
    """A table: the first column is text, the others are figures."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def peers_of(run: dict[str, Any], form: str) -> list[str]:
    found = dict.fromkeys(n for row in run["rows"] for n in row["peers"] if not n.startswith("jnorm"))
    return [*(["jnorm xla"] if form == "jnorm native" else []), *found]


def shown_name(name: str) -> str:
    return NAMES.get(name, name)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def sections(found: dict[str, Any]) -> Iterator[Section]:
    """The first allocator's tables have no suffix, so that links to them hold."""
    suffixes = {allocator: f", {allocator} allocator" if i else "" for i, allocator in enumerate(found)}
    for allocator, run in found.items():
        form = claims.headline(run)
        if form:
            yield from case_sections(run, form, suffixes[allocator])
    run = next(iter(found.values()))
    form = claims.headline(run)
    if form:
        yield memory_section(run, form)
    for allocator, run in found.items():
        if run["networks"]:
            yield network_section(run, suffixes[allocator])
    run = next(iter(found.values()))
    if run.get("stacks"):
        yield stack_section(run["stacks"])
    if run.get("collectives"):
        yield collective_section(run["collectives"])


# --- times ------------------------------------------------------------------------------------------------------------------


def case_sections(run: dict[str, Any], form: str, suffix: str) -> Iterator[Section]:
    for what, title in (("step", "Training step"), ("forward", "Forward pass alone")):
        yield time_section(run, form, what, title + suffix)
    if len(run["rows"]) <= DETAILED:
        yield from (detail_section(row, form, suffix) for row in run["rows"])
    yield summary_section(run, form, suffix)
    yield loss_section(run, form, suffix)
    if any(claims.judged(row, form) for row in run["rows"]):
        yield claim_section(run, form, suffix)


def time_section(run: dict[str, Any], form: str, what: str, title: str) -> Section:
    others = peers_of(run, form)
    rows = []
    for row in run["rows"]:
        mine = row["peers"].get(form, {}).get(what)
        if mine:
            limit = f"{mine['of_limit']:.0%}" if row["bytes"] >= claims.SMALL else NOTHING
            start = [row["name"], milliseconds(mine["median"]), milliseconds(mine["min"]), limit]
            rows.append(start + [ratio_cell(row["peers"].get(n, {}), what, form) for n in others])
    note = (
        f"Milliseconds of {form} (median and least), its share of what the copy bandwidth of this run allows, and times as long as the "
        "others take at their best way of calling: above 1, jnorm is faster. (…): not within the tolerance against float64."
    )
    return Section(title, note, ["", "ms", "least", "of limit", *map(shown_name, others)], rows)


def detail_section(row: dict[str, Any], form: str, suffix: str) -> Section:
    rows = []
    for what, name in itertools.product(("step", "forward"), row["peers"]):
        peer = row["peers"][name]
        if what in peer:
            one, over = peer[what], peer[what]["over"][form]
            interval = f"{over['low']:.2f}–{over['high']:.2f}"
            figures = [milliseconds(one["median"]), milliseconds(one["min"]), ratio(over["ratio"]), interval, ratio(over["minima"])]
            rows.append(
                [f"{what}, {shown_name(name)}", one["way"], *figures, f"{one['of_limit']:.0%}", f"{max(peer['errors'].values()):.0e}"]
            )
    bandwidth = row["bandwidth"]
    note = (
        f"Copy of an array of x's size {bandwidth['own_size'] / 1e9:.1f} GB/s, of memory {bandwidth['memory'] / 1e9:.1f} GB/s; "
        f"the limit is {bandwidth['used'].replace('_', ' ')}'s. Errors allowed: {row['tolerance']:.0e}."
    )
    columns = ["", "way", "ms", "least", f"/ {form}", "95 % interval", "of minima", "of limit", "error"]
    return Section(row["name"] + suffix, note, columns, rows)


def ratio_cell(peer: dict[str, Any], what: str, form: str) -> str:
    if what not in peer:
        return NOTHING
    text = ratio(peer[what]["over"][form]["ratio"])
    return f"({text})" if peer["inexact"] else text


def compared(run: dict[str, Any], form: str) -> Iterator[tuple[dict[str, Any], str, str, dict[str, Any]]]:
    """(row, "step" or "forward", peer, what there is about both) for every comparison of the run; jnorm's forms are not compared."""
    for row, what in itertools.product(run["rows"], ("step", "forward")):
        for name, peer in row["peers"].items():
            if not name.startswith("jnorm") and form in peer.get(what, {}).get("over", {}):
                yield row, what, name, peer


def summary_section(run: dict[str, Any], form: str, suffix: str) -> Section:
    collected: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for row, what, name, peer in compared(run, form):
        collected.setdefault((name, what, row["dtype"]), []).append((peer[what]["over"][form]["ratio"], row["name"]))
    rows = []
    for (name, what, dtype), values in sorted(collected.items(), key=lambda item: (item[0][1] == "forward", list(NAMES).index(item[0][0]))):
        worst = min(values)
        mean = geometric_mean([v for v, _ in values])
        rows.append([f"{shown_name(name)}, {what}, {short(dtype)}", ratio(mean), str(len(values)), ratio(worst[0]), worst[1]])
    note = "Geometric mean of the ratios over all cases of the run, and the case in which jnorm does worst."
    return Section("Over all cases" + suffix, note, ["", "mean", "cases", "worst", "where"], rows)


def losses(run: dict[str, Any], form: str) -> list[dict[str, Any]]:
    """Every comparison in which jnorm is slower, the worst first. `clear`: the 95 % interval is below 1 too."""
    found = []
    for row, what, name, peer in compared(run, form):
        over = peer[what]["over"][form]
        if over["ratio"] < 1:
            found.append({"case": row["name"], "what": what, "peer": name, **over, "clear": over["high"] < 1, "inexact": peer["inexact"]})
    return sorted(found, key=lambda one: one["ratio"])


def loss_section(run: dict[str, Any], form: str, suffix: str) -> Section:
    found, total = losses(run, form), sum(1 for _ in compared(run, form))
    rows = [
        [
            f"{one['case']}, {one['what']}",
            shown_name(one["peer"]) + (" (inexact)" if one["inexact"] else ""),
            ratio(one["ratio"]),
            f"{one['low']:.2f}–{one['high']:.2f}",
            "slower" if one["clear"] else "within the noise",
        ]
        for one in found
    ]
    clear = sum(one["clear"] for one in found)
    note = f"{len(found)} of {total} comparisons, of which {clear} are certain (the 95 % interval is below 1 too)."
    return Section("Where jnorm is slower" + suffix, note, ["", "than", "ratio", "95 % interval", ""], rows)


def claim_section(run: dict[str, Any], form: str, suffix: str) -> Section:
    columns = ["step, Flax", "step, PyTorch", "of the limit", "forward, Flax", "forward, PyTorch", "residuals / x", "temporaries / x",
               "XLA form, time / Flax's"]  # fmt: skip
    rows = []
    for row in run["rows"]:
        found = claims.judged(row, form)
        if found:
            rows.append([row["name"], *(claim_cell(found.get(c), c) for c in columns)])
    note = "Each figure with whether it reaches what is claimed (benchmarks/claims.py). Flax and PyTorch: the fastest of their forms."
    return Section("The claims" + suffix, note, ["", *columns], rows)


def claim_cell(judged: tuple[float, bool] | list | None, column: str) -> str:
    if judged is None:
        return NOTHING
    value, holds = judged
    text = f"{value:.0%}" if column == "of the limit" else f"{value:.3g}"
    return f"{text} {'yes' if holds else 'no'}"


# --- bytes, networks --------------------------------------------------------------------------------------------------------


MEMORY = {"residuals": ("residuals",), "temporaries": ("step", "temp"), "peak": ("step", "peak"), "kernels": ("step", "kernels"),
          "traffic": ("step", "traffic")}  # fmt: skip


def memory_section(run: dict[str, Any], form: str) -> Section:
    names = [n for n in dict.fromkeys((form, "jnorm xla", "flax.linen")) if n in run["peers"]]
    rows = []
    for row in run["rows"]:
        memories = [row["peers"].get(name, {}).get("memory", {}) for name in names]
        if any("step" in m for m in memories):
            rows.append([row["name"], *(" / ".join(figure(m, path) for m in memories) for path in MEMORY.values())])
    note = (
        f"A step: {' / '.join(map(shown_name, names))}. Bytes in multiples of x's; kernels are launches of the compiled program, "
        "and traffic is what they read and write. Counted, not timed."
    )
    return Section("Bytes and kernels", note, ["", *MEMORY], rows)


def figure(memory: Any, path: tuple[str, ...]) -> str:
    for key in path:
        memory = memory.get(key) if memory else None
    return NOTHING if memory is None else str(memory) if isinstance(memory, int) else f"{memory:.2f}"


def network_section(run: dict[str, Any], suffix: str) -> Section:
    rows = []
    for network in run["networks"]:
        for name, one in network["variants"].items():
            over = one["over_flax"]
            rows.append(
                [
                    f"{network['network']}, {short(network['dtype'])}: {name}",
                    milliseconds(one["median"]),
                    milliseconds(one["min"]),
                    f"{one['share']:.0%}" if name != "none" else NOTHING,
                    f"{over['ratio']:.2f} ({over['low']:.2f}–{over['high']:.2f})",
                    f"{one['peak'] / 2**20:.0f}" if "peak" in one else NOTHING,
                ]
            )
    note = "Training step with the same weights; `none` keeps scale and bias only. The share is what the norms take of the step."
    return Section("Whole networks" + suffix, note, ["", "ms", "least", "norms' share", "Flax / this", "peak MiB"], rows)


def stack_section(stacks: list[dict[str, Any]]) -> Section:
    rows = [[f"{s['block']}, {short(s['dtype'])}", f"{s['marginal_temp']:.2f}"] for s in stacks]
    note = "Temporary bytes that one more block of norm, ReLU and dense costs in a training step, in multiples of its input's; no timing."
    return Section("Memory of a deep network", note, ["", "per block"], rows)


def collective_section(counted: dict[str, Any]) -> Section:
    def text(kinds: dict[str, int]) -> str:
        return ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"

    rows = [[name, text(one["forward"]), text(one["step"])] for name, one in counted.items()]
    return Section("Collectives of a batch norm over 8 devices", "Counted in the compiled programs.", ["", "forward", "step"], rows)

"""One case: everyone is built, compared with float64, tried in every way of calling, and timed in interleaved rounds."""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax

from . import bandwidth, calling, memory, oracle, timing
from .cases import Case, floor
from .peers import TORCH_PEERS, Unsupported, build
from .peers.torch_process import TorchProcess
from .timing import Timed

# A way that the trial finds this much slower than the best is not carried into the rounds.
NEAR_BEST = 1.15


class GateFailure(Exception):
    """jnorm is wrong: nothing that it is timed at would mean anything."""


@dataclasses.dataclass
class Entrant:
    """A peer in a case. `runs`: {"forward" | way: its timed run}. `left_out`: why it has none."""

    name: str
    runs: dict[str, Timed] = dataclasses.field(default_factory=dict)
    trial: dict[str, float] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: str = ""

    @property
    def ways(self) -> list[str]:
        return [k for k in self.runs if k != "forward"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all cases of a run share."""

    peers: list[str]
    rounds: int
    cache: int
    memory_bandwidth: float
    torch: TorchProcess | None = None
    all_ways: bool = True


def ours(name: str) -> bool:
    return name.startswith("jnorm")


def measure(case: Case, setting: Setting, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The row of a case, as it is in the JSON."""
    given = oracle.inputs(case)
    wanted = oracle.expected(case, given)
    placed: dict[Any, jax.Array] = {}
    entrants = []
    for name in setting.peers:
        tell(f"{case.name}: {name}")
        entrants.append(enter(name, case, setting, given, wanted, placed))
    del given, wanted
    tell(f"{case.name}: {setting.rounds} rounds")
    copies = bandwidth.ways(case.bytes)
    times, dropped = run_rounds([e for e in entrants if e.runs], copies, setting.rounds)
    if setting.torch is not None:
        setting.torch.clear()
    return row(case, setting, entrants, copies, times, dropped)


# --- before the rounds ------------------------------------------------------------------------------------------------------


def enter(name: str, case: Case, setting: Setting, given: oracle.Arrays, wanted: oracle.Arrays, placed: dict[Any, jax.Array]) -> Entrant:
    entrant = Entrant(name)
    try:
        if name in TORCH_PEERS:
            enter_torch(entrant, case, setting, wanted)
        else:
            enter_jax(entrant, case, setting, given, wanted, placed)
    except Unsupported as reason:
        entrant.left_out = str(reason)
    except Exception as error:
        if ours(name):
            raise
        entrant.left_out = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        entrant.runs.clear()
    allowed = oracle.tolerance(case, fused=True)
    if ours(name) and entrant.errors and max(entrant.errors.values()) > allowed:
        raise GateFailure(f"{case.name}, {name}: errors {entrant.errors}, allowed {allowed:.1e}")
    if entrant.ways:
        keep_near_best(entrant)
    return entrant


def enter_torch(entrant: Entrant, case: Case, setting: Setting, wanted: oracle.Arrays) -> None:
    if setting.torch is None:
        raise Unsupported("PyTorch is not installed")
    results, runs = setting.torch.prepare(case, TORCH_PEERS[entrant.name])
    entrant.errors = oracle.errors(results, wanted)
    entrant.runs = {"one" if k == "step" else k: v for k, v in runs.items()}
    entrant.trial = {k: timing.estimate(run) for k, run in entrant.runs.items()}


def enter_jax(
    entrant: Entrant, case: Case, setting: Setting, given: oracle.Arrays, wanted: oracle.Arrays, placed: dict[Any, jax.Array]
) -> None:
    built = build(entrant.name, case)
    arguments = calling.arguments(case, given, built, placed)
    forward = calling.program(built, calling.forward(built), arguments)
    entrant.memory = {"forward": memory.of_program(case, forward.compiled)}
    add_run(entrant, "forward", forward)
    if not case.trains:
        entrant.errors = oracle.errors(calling.results(case, built, forward.call()), wanted)
        return
    entrant.memory["residuals"] = memory.residuals(case, built, arguments)
    for way in calling.WAYS if setting.all_ways else (calling.CLAIMED,):
        with maybe_without(way, entrant):
            program = calling.step_program(case, built, way, arguments)
            add_run(entrant, way, program)
            if way == calling.CLAIMED:
                entrant.errors = oracle.errors(calling.results(case, built, program.call()), wanted)
                entrant.memory["step"] = memory.of_program(case, program.compiled)


def add_run(entrant: Entrant, what: str, program: calling.Program) -> None:
    entrant.runs[what] = timing.timed(program.call, jax.block_until_ready)
    entrant.trial[what] = timing.estimate(entrant.runs[what])


@contextlib.contextmanager
def maybe_without(way: str, entrant: Entrant) -> Iterator[None]:
    """A peer whose vjp does not pass between programs has no split form."""
    try:
        yield
    except Exception:
        if way != "split" or ours(entrant.name):
            raise


def keep_near_best(entrant: Entrant) -> None:
    """Peers keep their best ways; jnorm the one that its claims are about."""
    best = min(entrant.trial[w] for w in entrant.ways)
    for way in entrant.ways:
        if way != calling.CLAIMED if ours(entrant.name) else entrant.trial[way] > NEAR_BEST * best:
            del entrant.runs[way]


# --- the rounds and the row -------------------------------------------------------------------------------------------------

Times = dict[tuple[str, str], list[float]]


def run_rounds(entrants: list[Entrant], copies: dict[str, Timed], rounds: int) -> tuple[Times, int]:
    variants = {(e.name, what): run for e in entrants for what, run in e.runs.items()} | {("copy", k): v for k, v in copies.items()}
    estimates = {(e.name, what): e.trial[what] for e in entrants for what in e.runs}
    estimates |= {("copy", k): timing.estimate(v) for k, v in copies.items()}
    labels = {"\t".join(k): k for k in variants}
    times, dropped = timing.interleave(
        {label: variants[k] for label, k in labels.items()}, rounds, {label: estimates[k] for label, k in labels.items()}
    )
    return {labels[label]: t for label, t in times.items()}, dropped


def row(case: Case, setting: Setting, entrants: list[Entrant], copies: dict[str, Timed], times: Times, dropped: int) -> dict[str, Any]:
    own = max(2 * case.bytes / statistics.median(times["copy", k]) for k in copies)
    beyond = case.bytes > setting.cache
    used = setting.memory_bandwidth if beyond else own
    whats = ["forward", *(["step"] if case.trains else [])]
    floors = {what: floor(case, what, setting.cache) for what in whats}
    peers = {e.name: peer_row(case, e, times, {what: f * case.bytes / used for what, f in floors.items()}) for e in entrants}
    return {
        **dataclasses.asdict(case),
        "name": case.name,
        "bytes": case.bytes,
        "beyond_cache": beyond,
        "floor": floors,
        "bandwidth": {"own_size": own, "memory": setting.memory_bandwidth, "used": "memory" if beyond else "own_size"},
        "tolerance": oracle.tolerance(case),
        "rounds_dropped": dropped,
        "peers": peers,
    }


def peer_row(case: Case, entrant: Entrant, times: Times, limits: dict[str, float]) -> dict[str, Any]:
    if entrant.left_out or not entrant.runs:
        return {"left_out": entrant.left_out or "nothing ran"}
    found: dict[str, Any] = {"errors": entrant.errors, "memory": entrant.memory, "trial": entrant.trial}
    found["inexact"] = max(entrant.errors.values()) > oracle.tolerance(case)
    best = {"forward": "forward"}
    if entrant.ways:
        best["step"] = min(entrant.ways, key=lambda w: statistics.median(times[entrant.name, w]))
    for what, way in best.items():
        mine = times[entrant.name, way]
        found[what] = timing.summary(mine) | {"way": way, "of_limit": limits[what] / statistics.median(mine), "times": mine}
    return found


def with_ratios(row: dict[str, Any]) -> dict[str, Any]:
    """Adds to every peer's forward and step its time over that of each form of jnorm: above 1, jnorm is faster."""
    for form in [n for n in row["peers"] if ours(n) and "left_out" not in row["peers"][n]]:
        for other in row["peers"].values():
            for what in ("forward", "step"):
                if what in other:
                    other[what].setdefault("over", {})[form] = timing.compare(other[what]["times"], row["peers"][form][what]["times"])
    return row

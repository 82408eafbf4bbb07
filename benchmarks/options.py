"""The command line, and what it asks for."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from .cases import DTYPES, NORMS, OPS

FILES = ("--json", "--markdown", "--png", "--page")
PARTS = ("cases", "networks", "stacks", "collectives")
QUICK_PEERS = ["jnorm", "flax", "haiku", "equinox", "keras", "torch eager"]


@dataclasses.dataclass(frozen=True)
class Request:
    suite: str = "full"
    only: list[str] = dataclasses.field(default_factory=lambda: list(PARTS))
    norms: list[str] = dataclasses.field(default_factory=list)
    ops: list[str] = dataclasses.field(default_factory=list)
    shape: tuple[int, ...] | None = None
    dtypes: list[str] = dataclasses.field(default_factory=list)
    peers: list[str] = dataclasses.field(default_factory=list)
    rounds: int = 9
    all_ways: bool = True


def words(text: str) -> list[str]:
    return [w for w in text.split(",") if w]


def one_of(*allowed: str) -> Any:
    def parse(text: str) -> list[str]:
        wrong = [w for w in words(text) if w not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(f"no {', '.join(wrong)}; there are {', '.join(allowed)}")
        return words(text)

    return parse


def shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(d) for d in text.replace("x", ",").replace("×", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is like 32,56,56,64, got {text!r}") from None


def parser(description: str) -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser("python -m benchmarks", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--suite", choices=("full", "figures", "quick"), default="full", help="which shapes")
    parse.add_argument("--quick", action="store_true", help="the same as --suite quick --rounds 3 without compiled PyTorch")
    parse.add_argument("--only", type=one_of(*PARTS), help="parts of the run")
    parse.add_argument("--norm", type=one_of(*NORMS), default=[])
    parse.add_argument("--op", type=one_of(*OPS), default=[], help="what is around the norm; `add` is x + residual before it")
    parse.add_argument("--shape", type=shape, help="one shape, channels last, instead of the suite's")
    parse.add_argument("--dtype", type=one_of(*DTYPES), default=[])
    parse.add_argument("--peers", type=words, default=[], help="names or how they begin, as in flax,torch; jnorm always runs")
    parse.add_argument("--rounds", type=int, help="rounds that count (9; in --quick 3)")
    allocators = ("retained", "default", "both")
    parse.add_argument(
        "--allocator", choices=allocators, help="glibc keeping its memory, or as it is (both; with --shape or --quick the first)"
    )
    parse.add_argument("--one-way", action="store_true", help="do not try split and dependent steps")
    parse.add_argument("--json", type=Path, help="write all that was measured")
    parse.add_argument("--markdown", type=Path, help="write the tables")
    parse.add_argument("--png", type=Path, help="draw the ratios")
    parse.add_argument("--page", type=Path, help="write the page of the documentation, and its picture to images/ beside it")
    parse.add_argument("--from-json", type=Path, help="measure nothing: report what --json wrote")
    parse.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parse


def request_of(args: argparse.Namespace) -> Request:
    suite = "quick" if args.quick else args.suite
    light = bool(args.norm or args.op or args.shape)
    wanted = args.peers or (QUICK_PEERS if suite == "quick" else [])
    return Request(
        suite=suite,
        only=args.only or (["cases"] if light else list(PARTS)),
        norms=args.norm,
        ops=args.op,
        shape=args.shape,
        dtypes=[DTYPES[d] for d in args.dtype],
        peers=wanted,
        rounds=args.rounds or (3 if suite == "quick" else 9),
        all_ways=not args.one_way,
    )


def allocators(args: argparse.Namespace) -> tuple[str, ...]:
    one = args.quick or args.suite == "quick" or args.shape is not None
    chosen = args.allocator or ("retained" if one else "both")
    return ("retained", "default") if chosen == "both" else (chosen,)

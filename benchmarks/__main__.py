"""Normalization, measured: jnorm against Flax, Haiku, Equinox, Keras and PyTorch.

    python -m benchmarks                          everything, for the documentation (hours)
    python -m benchmarks --suite figures          the shapes that claims are made about
    python -m benchmarks --quick                  that it runs, in under two minutes
    python -m benchmarks --norm batch_norm --shape 32,56,56,64 --dtype f32 --peers flax     one case, for tuning

Everything is compared with float64 before it is timed. The exit status is 1 where jnorm is wrong, whatever the times are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import machine
from .options import FILES, allocators, parser, request_of


def child(args: argparse.Namespace) -> None:
    """This process has the environment of its allocator."""
    from .run import run

    run(request_of(args), lambda found: args.child.write_text(json.dumps(found)))


def runs(args: argparse.Namespace) -> dict[str, Any]:
    """{allocator: its run}, each in a process of its own. What one that ended early had measured stays beside the file of --json."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for allocator in allocators(args):
            path = args.json.with_suffix(f".{allocator}.json") if args.json else Path(folder) / "run.json"
            command = [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--child", str(path)]
            done = subprocess.run(command, env=environment(allocator))
            if done.returncode:
                sys.exit(f"the run with the {allocator} allocator ended with {done.returncode}" + (f"; see {path}" if args.json else ""))
            found[allocator] = json.loads(path.read_text()) | {"command": command_of(sys.argv[1:], allocator)}
            path.unlink()
    return found


def command_of(arguments: list[str], allocator: str) -> str:
    """What repeats a run, without the files it was written to."""
    kept = [a for i, a in enumerate(arguments) if a not in FILES and (i == 0 or arguments[i - 1] not in (*FILES, "--allocator"))]
    return " ".join(["--allocator", allocator, *(a for a in kept if a != "--allocator")])


def environment(allocator: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in machine.RETAINED}
    kept.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares an accelerator with JAX
    return kept | (machine.RETAINED if allocator == "retained" else {})


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    if args.child:
        child(args)
        return
    found = json.loads(args.from_json.read_text()) if args.from_json else runs(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    from . import report

    report.show(found)
    if args.markdown:
        args.markdown.write_text(report.markdown(found))
    if args.page:
        args.page.write_text(report.page(found), encoding="utf-8")
    for path in (args.png, args.page and args.page.parent / "images" / "benchmarks.png"):
        if path:
            from . import picture

            picture.draw(found, path)
    failures = [f"{allocator}: {text}" for allocator, run in found.items() for text in run["failures"]]
    for text in failures:
        print(f"WRONG: {text}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

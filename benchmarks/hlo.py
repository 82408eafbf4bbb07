"""Kernels, memory traffic and collectives, counted in the text of a compiled program. Deterministic: regressions are tested on these."""

import dataclasses
import math
import re

WIDTH = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
         "c64": 8, "c128": 16}  # fmt: skip
# What moves no data of its own. A `-done` ends what a `-start` began.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, |$)")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Program:
    """`kernels`: launches of the entry computation; `bytes`: what they read and write, each operand once; `collectives`: by kind, in the
    whole program."""

    kernels: int
    bytes: int
    collectives: dict[str, int]


def array_bytes(shape: str) -> int:
    """Bytes of all arrays in the text of a shape, a tuple's too."""
    found = ARRAY.findall(shape)
    return sum(WIDTH.get(kind, 0) * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in found)


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text)


def entry(text: str) -> list[str]:
    """The lines of the entry computation."""
    body = re.search(r"^ENTRY .*?\{\n(.*?)^\}", text, re.M | re.S)
    return body[1].splitlines() if body else []


def count(text: str) -> Program:
    text = without_comments(text)
    shapes: dict[str, int] = {}
    kernels = moved = 0
    for line in entry(text):
        found = INSTRUCTION.match(line)
        if not found:
            continue
        name, shape, opcode, operands = found.groups()
        shapes[name] = array_bytes(shape)
        if opcode not in FREE and not opcode.endswith("-done"):
            kernels += 1
            moved += shapes[name] + sum(shapes.get(o, 0) for o in set(re.findall(r"%?([\w.-]+)", operands)))
    return Program(kernels, moved, collectives(text))


def collectives(text: str) -> dict[str, int]:
    found = re.findall(rf"= .*? ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    return {kind: found.count(kind) for kind in COLLECTIVES if kind in found}

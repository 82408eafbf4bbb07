"""Fail where an object that is compiled for one instruction set holds a function that the linker may take for all of them."""

import subprocess
import sys
from pathlib import Path

KINDS = {"W", "V", "u"}  # weak and unique: of several copies the linker keeps one


def shared(build: Path) -> list[str]:
    found = []
    for folder in sorted(build.glob("CMakeFiles/jnorm_*.dir")):
        isa = folder.name.removeprefix("jnorm_").removesuffix(".dir")
        if isa in ("shared", "cpu"):
            continue
        objects = sorted(folder.glob("*.o"))
        assert objects, folder
        for item in objects:
            listing = subprocess.run(["nm", "-C", "--defined-only", item], capture_output=True, text=True, check=True).stdout
            for line in listing.splitlines():
                kind, name = line.split(maxsplit=2)[1:]
                if kind in KINDS and f"jnorm::{isa}::" not in name:
                    found.append(f"{folder.name}/{item.name}: {name}")
    return found


builds = [Path(p) for p in sys.argv[1:]]
assert builds and all(list(b.glob("CMakeFiles/jnorm_*.dir")) for b in builds), builds
wrong = [text for build in builds for text in shared(build)]
for text in wrong:
    print(text)
sys.exit(bool(wrong))

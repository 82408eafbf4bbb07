"""What a figure was measured on: processor, caches, versions, commit; and the share of the time that the hypervisor took."""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch", "numpy")
# Where the system does not say: what most present accelerators and servers have.
DEFAULT_CACHE = 32 << 20
ACCELERATOR_CACHE = 50 << 20
# glibc gives every larger array back to the system, and each page of a new one costs a fault: with these it keeps them. One arena, since
# that of a thread other than the first holds no array above 64 MB.
RETAINED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
ROOT = Path(__file__).parent.parent


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_size(text: str) -> int:
    """Bytes of "32768K" or "2M"."""
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", text.strip()).groups()  # type: ignore[union-attr]
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[int, int]:
    """{level: bytes} of the data caches."""
    found: dict[int, int] = {}
    for index in root.glob("index*"):
        if (index / "type").read_text().strip() != "Instruction":
            found[int((index / "level").read_text())] = parse_size((index / "size").read_text())
    return found


def last_level_cache(kind: str = "cpu") -> int:
    if kind != "cpu":
        return ACCELERATOR_CACHE
    found = caches()
    return found[max(found)] if found else DEFAULT_CACHE


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "missing"

    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@functools.cache
def commit() -> str:
    """The commit of the working tree, with "+" where the tree differs from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def parse_steal(text: str) -> tuple[int, int]:
    """(ticks stolen by the hypervisor, ticks in all) of /proc/stat's first line. Guest time is in user time already."""
    ticks = [int(t) for t in text.splitlines()[0].split()[1:]]
    return (ticks[7] if len(ticks) > 7 else 0), sum(ticks[:8])


def steal() -> tuple[int, int]:
    stat = Path("/proc/stat")
    return parse_steal(stat.read_text()) if stat.exists() else (0, 0)


def describe(devices: Any) -> dict[str, Any]:
    """What every report starts with."""
    kind = devices[0].platform
    return {
        "processor": processor(),
        "device": f"{len(devices)} × {devices[0].device_kind}" if kind != "cpu" else "CPU",
        "platform": kind,
        "cores": cores(),
        "last_level_cache": last_level_cache(kind),
        "versions": versions(),
        "commit": commit(),
        "system": f"{platform.system()} {platform.release()}",
    }

"""How jnorm is built: settings that only show when somebody installs it elsewhere, and the library where it was built."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

import jnorm

ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = PYPROJECT["tool"]["scikit-build"]
LIBRARY = pathlib.Path(jnorm.__file__).parent / "_kernels" / ("libjnorm_cpu" + (".dylib" if sys.platform == "darwin" else ".so"))


def bound(requirements, name):
    (found,) = [m[1] for r in requirements if (m := re.fullmatch(rf"{name}>=([\d.]+)", r))]
    return found


def test_headers_are_as_old_as_the_oldest_jaxlib():
    assert bound(PYPROJECT["build-system"]["requires"], "jaxlib") == bound(PYPROJECT["project"]["dependencies"], "jaxlib")


def test_a_failed_build_gives_pure_python():
    (fallback,) = [o for o in BUILD["overrides"] if o["if"] == {"failed": True}]
    assert fallback["wheel"] == {"cmake": False} and "not built" in fallback["messages"]["after-success"]


def test_one_wheel_serves_every_python():
    assert BUILD["wheel"]["py-api"] == "py3"
    wheel = metadata.distribution("jnorm").read_text("WHEEL") if _is_installed() else None
    if wheel is not None:
        tags = re.findall(r"^Tag: (.*)$", wheel, re.M)
        assert tags and all(t.startswith("py3-none-") for t in tags)


def _is_installed():
    return any(d.metadata["Name"] == "jnorm" for d in metadata.distributions())


def test_every_source_is_compiled():
    """A C++ file that CMakeLists.txt does not name would not be in the library, and nobody would see."""
    named = set(re.findall(r"[\w/]+\.cpp", (ROOT / "native" / "CMakeLists.txt").read_text()))
    assert named == {p.relative_to(ROOT / "native").as_posix() for p in (ROOT / "native").rglob("*.cpp") if "CMakeFiles" not in p.parts}


def test_no_flag_of_the_building_machine():
    """-march=native is for the driver under sanitizers alone, which runs where it is built."""
    text = (ROOT / "native" / "CMakeLists.txt").read_text()
    flags = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert not [line for line in flags if "-ffast-math" in line]
    assert [line.split("(")[0].strip() for line in flags if "-march=native" in line] == ["set"]
    assert re.search(r"if\(JNORM_SANITIZE\)\s+set\(baseline_flags -march=native\)", text)


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native kernels are not installed")
@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="needs nm, and the ELF format")
def test_the_library_exports_its_own_names_only():
    listing = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    assert "jnorm_isa" in names and all(n.startswith("jnorm_") for n in names)


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native kernels are not installed")
def test_the_library_is_used():
    assert jnorm.kernels_status().isa is not None

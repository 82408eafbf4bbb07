"""Loading the native kernels: asked for, missing, broken."""

import json
import shutil
import subprocess
import sys

import jax
import pytest

import jnorm
import native_fuzz as fuzz
from jnorm._kernels import _library
from native_fuzz import PACKAGE, native, python
from pairwise import every_other

LIBRARY = "libjnorm_cpu" + (".dylib" if sys.platform == "darwin" else ".so")
# An editable install finds its own tree before any path, and not the copy that is meant.
BY_PATH = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("_editable")]
"""
LOOK = (
    BY_PATH
    + """
import json, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import jnorm
    import jax.numpy as jnp
    first = float(jnorm.layer_norm(jnp.arange(64.0).reshape(2, 32))[0, 0])
    for _ in range(2):
        jnorm.kernels_status()
warned = [str(w.message) for w in seen if issubclass(w.category, RuntimeWarning) and "jnorm" in str(w.message)]
refused = ""
try:
    with jnorm.kernels("native"):
        pass
except RuntimeError as e:
    refused = str(e)
print(json.dumps({**jnorm.kernels_status()._asdict(), "warned": warned, "refused": refused, "first": first}))
"""
)
# Row 0 … 31: (0 - 15.5) / sqrt(85.25)
FIRST = -15.5 / 85.25**0.5


def look(**options):
    done = python("-c", LOOK, **options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert abs(found["first"] - FIRST) < 1e-5
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A copy of the package without the library."""
    package = tmp_path_factory.mktemp("bare") / "jnorm"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", LIBRARY))
    return package


def compiled(tmp_path, source):
    """A shared library of the C source, or a skip."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "broken.c").write_text(source)
    command = [compiler, "-shared", "-fPIC", f"-I{jax.ffi.include_dir()}", "broken.c", "-o", "broken"]
    subprocess.run(command, cwd=tmp_path, check=True)
    return (tmp_path / "broken").read_bytes()


@native
def test_status_by_default_and_by_the_environment():
    found = look()
    assert (found["active"], found["warned"], found["refused"]) == ("native", [], "")
    assert found["isa"] == jnorm.kernels_status().isa and "by default" in found["reason"]
    for form in fuzz.FORMS:
        found = look(JNORM_KERNELS=form)
        assert found["active"] == form and "environment variable JNORM_KERNELS" in found["reason"]
        assert found["isa"] == jnorm.kernels_status().isa
    assert look(JNORM_KERNELS="")["active"] == "native"


def test_the_context_says_so():
    before = jnorm.kernels_status()
    with jnorm.kernels("xla"):
        assert jnorm.kernels_status() == ("xla", 'chosen by jnorm.kernels("xla")', before.isa)
    assert jnorm.kernels_status() == before


@pytest.mark.parametrize("form", ["nonsense", "", "NATIVE"])
def test_a_form_that_is_none(form):
    with pytest.raises(ValueError, match=f'jnorm.kernels must be "native" or "xla", got {form!r}'), jnorm.kernels(form):
        pass
    if form:
        done = python("-c", "import jnorm", JNORM_KERNELS=form)
        assert done.returncode == 1
        assert f'ValueError: the environment variable JNORM_KERNELS must be "native" or "xla", got {form!r}.' in done.stderr


def test_a_missing_library(bare):
    """No warning: an install without a compiler is a whole one. Asking for it is an error that says how to get it."""
    found = look(package=bare)
    assert (found["active"], found["isa"], found["warned"]) == ("xla", None, [])
    assert "not installed" in found["reason"]
    for part in ("jnorm.kernels", "not installed", "C++17 compiler", "pip install"):
        assert part in found["refused"]
    assert look(package=bare, JNORM_KERNELS="xla")["active"] == "xla"
    done = python("-c", f"{BY_PATH}import jnorm", package=bare, JNORM_KERNELS="native")
    assert done.returncode == 1
    assert "RuntimeError: the environment variable JNORM_KERNELS asks for" in done.stderr and "pip install" in done.stderr


def test_missing_in_this_process(monkeypatch):
    monkeypatch.setattr(_library, "_library", _library._Library(None, "the native kernels are not installed"))
    with pytest.raises(RuntimeError, match="C\\+\\+17 compiler"), jnorm.kernels("native"):
        pass
    monkeypatch.setattr(_library, "_default", None)
    assert jnorm.kernels_status() == ("xla", "the native kernels are not installed", None)


OTHER_VERSION = """
#include "xla/ffi/api/c_api.h"
#define HANDLER(name) XLA_FFI_Error* jnorm_##name(XLA_FFI_CallFrame* frame) { \\
  for (XLA_FFI_Extension_Base* e = frame->extension_start; e; e = e->next) \\
    if (e->type == XLA_FFI_Extension_Metadata) \\
      ((XLA_FFI_Metadata_Extension*)e)->metadata->api_version.major_version = XLA_FFI_API_MAJOR + 1; \\
  return 0; }
""" + "".join(f"HANDLER({name})\n" for name in _library._TARGETS) + 'const char* jnorm_isa(void) { return "other"; }\n'  # fmt: skip
BROKEN = {  # what lies in the library's place, and what the warning says of it
    "text": (lambda _: b"not a library\n", "libjnorm_cpu"),
    "symbols": (lambda tmp_path: compiled(tmp_path, "int jnorm_something(void) { return 0; }\n"), "jnorm_moments"),
    "version": (lambda tmp_path: compiled(tmp_path, OTHER_VERSION), "version"),
}


@pytest.mark.parametrize("what", ["text", *every_other(["version", "symbols"])])
def test_a_broken_library(what, bare, tmp_path):
    """One warning that says why, XLA's code, and no harm to what else runs on JAX."""
    make, said = BROKEN[what]
    package = tmp_path / "jnorm"
    shutil.copytree(bare, package)
    (package / "_kernels" / LIBRARY).write_bytes(make(tmp_path))
    found = look(package=package)
    assert (found["active"], found["isa"]) == ("xla", None)
    [warning] = found["warned"]
    assert "jnorm uses XLA's code" in warning and said in warning and "pip install" in warning
    assert found["reason"] in warning and found["reason"] in found["refused"]
    assert python("-W", "ignore", "-c", f"{BY_PATH}import jnorm", package=package).stderr == ""


def test_a_form_is_checked_at_the_call():
    """As a plain statement it chooses nothing, but it says what is wrong."""
    with pytest.raises(ValueError, match='jnorm.kernels must be "native" or "xla", got \'foo\''):
        jnorm.kernels("foo")
    before = jnorm.kernels_status()
    jnorm.kernels("xla")
    assert jnorm.kernels_status() == before

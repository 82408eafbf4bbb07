"""`python -m jnorm`: what is installed, the devices, and which kernels are active."""

import importlib.metadata
import json

import jax

import jnorm
from jnorm import __main__ as main
from native_fuzz import python


def told(*arguments, **environment):
    done = python("-W", "error", "-m", "jnorm", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_json():
    found = json.loads(told("--json", JNORM_KERNELS="xla"))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    assert found["versions"] == found["versions"] | versions | {"jnorm": jnorm.__version__}
    assert (found["platform"], found["devices_error"], found["environment"]["JNORM_KERNELS"]) == ("cpu", None, "xla")
    assert [d["platform"] for d in found["devices"]] == ["cpu"] and found["devices"][0]["id"] == 0
    kernels = found["kernels"]
    assert (kernels["active"], kernels["isa"]) == ("xla", jnorm.kernels_status().isa)
    assert "environment variable JNORM_KERNELS" in kernels["reason"] and kernels["fix"]


def test_text_without_the_optional_packages(tmp_path):
    """Flax is broken here, and neither optax nor rich are to be found; none of this is an error."""
    (tmp_path / "flax.py").write_text("raise ImportError('made for another JAX')")
    hide = (
        "import importlib.metadata as m, runpy, sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('optax', 'rich'): raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'optax': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        f"m.version = version; sys.meta_path.insert(0, Hidden()); sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.argv = ['jnorm']; runpy.run_module('jnorm', run_name='__main__')"
    )
    done = python("-c", hide)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "cannot be imported: ImportError: made for another JAX" in lines["flax"]
    assert importlib.metadata.version("flax") in lines["flax"]
    assert lines["optax"].split() == ["optax", "not", "installed"]
    assert lines["numpy"].split()[1] == importlib.metadata.version("numpy") and "1 × cpu" in lines["devices"]
    assert lines["kernels"].split()[1] == ("xla:" if jnorm.kernels_status().isa is None else "native:")


def test_a_platform_that_is_not_there(monkeypatch, capsys):
    """The devices are part of the report, not what it fails for."""

    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu': no TPU\nmore")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    main.main([])
    text = capsys.readouterr().out
    assert "none: RuntimeError: Unable to initialize backend 'tpu': no TPU (JAX_PLATFORMS=tpu" in text
    assert "more" not in text.split("no TPU")[1].split("kernels")[0]


def test_a_failure_without_a_word(monkeypatch):
    """As of JAX where a platform is asked for, but not installed."""

    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert "cannot start the platform (AssertionError" in main._devices()[1] and "JAX_PLATFORMS=cuda asks" in main._devices()[1]


def test_a_setting_of_kernels_that_there_is_not():
    """The message alone; what imports jnorm for itself gets its error."""
    done = python("-m", "jnorm", JNORM_KERNELS="bogus")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == 'the environment variable JNORM_KERNELS must be "native" or "xla", got \'bogus\'.\n'
    done = python("-c", "import jnorm", JNORM_KERNELS="bogus")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: the environment variable" in done.stderr


def test_the_kernels_in_words(monkeypatch, capsys):
    """Which are active, why, and what to do, for each way that it can be."""
    from jnorm._kernels import _library

    def text(where="cpu", **status):
        monkeypatch.setattr(main, "kernels_status", lambda: _library.KernelsStatus(**status))
        return main._kernels(where)

    found = text(active="native", reason="installed", isa="avx2")
    assert found["fix"] is None and "native kernels" in found["meaning"]
    found = text(active="xla", reason="the native kernels are not installed", isa=None)
    assert "C++17 compiler" in found["fix"] and "XLA's code" in found["meaning"]
    found = text(active="xla", reason="chosen by the environment variable JNORM_KERNELS", isa="avx2")
    assert "Unset JNORM_KERNELS" in found["fix"]
    found = text("gpu", active="native", reason="installed", isa="avx2")
    assert "On gpu, the default platform here, it always computes with XLA's code" in found["meaning"]
    assert "are not used" in main._text({**main.report(), "kernels": text(active="xla", reason="chosen", isa="avx2")})
    text(active="native", reason="installed", isa="avx2")
    main.main([])
    out = capsys.readouterr().out
    assert "To change that" not in out and "not used" not in out

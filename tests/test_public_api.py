"""What is public, what imports what, and that the documentation is there and runs."""

import ast
import doctest
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest

import jnorm
import jnorm.linen
import jnorm.nnx
import jnorm.tools

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(jnorm.__file__).parent
NORMS = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "batch_renorm",
    "cross_iteration_batch_norm",
    "cross_mini_batch_norm",
    "divisive_batch_norm",
    "divisive_norm",
    "eval_norm",
    "filter_response_norm",
    "ghost_batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "mean_only_batch_norm",
    "rms_norm",
    "tracked_instance_norm",
]
DIVIDES_BY_NOTHING = {"mean_only_batch_norm"}
WITHOUT_STATISTICS = ["local_response_norm", "thresholded_linear_unit"]
FUNCTIONS = [n for n in jnorm.__all__ if inspect.isfunction(getattr(jnorm, n))]
TOOLS = [f for tools in (jnorm.tools, jnorm.tools.convert) for n in tools.__all__ if inspect.isfunction(f := getattr(tools, n))]
REPARAMETRIZATIONS = [getattr(jnorm.reparam, n) for n in jnorm.reparam.__all__]
CLASSES = [getattr(api, n) for api in (jnorm.linen, jnorm.nnx) for n in api.__all__]
# The library of native kernels ends like a module of Python, but is none.
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "jnorm.") if not m.name.endswith("libjnorm_cpu"))

# Who may import whom: only what stands before it, and itself; those of one level do not know each other.
LEVELS = [{"typing"}, {"_jax_internals"}, {"_stats"}, {"_kernels"}, {"_pipeline"}, {"_norms", "reparam"}, {"_modules"}, {"linen", "nnx"}]
LEVELS += [{"tools"}, {"__main__"}]
LAYERS = set().union(*LEVELS)
# The files of one kind of call are split where they pass this; the classes are mostly signatures and what their arguments mean.
LONGEST = {"linen": 500, "nnx": 500}
COLLECTIVES = {"psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "psum_scatter", "reduce_scatter", "pbroadcast"}


def test_all_is_what_is_public():
    public = {n for n in vars(jnorm) if not n.startswith("_") and not inspect.ismodule(getattr(jnorm, n))}
    assert public == set(jnorm.__all__)
    assert sorted(jnorm.__all__) == list(jnorm.__all__)


def test_the_contract_is_there():
    wanted = {*NORMS, "batch_norm_state", "normalize", "moments", "combine", "pad_batch", "Stats"}
    assert wanted <= set(jnorm.__all__)


@pytest.mark.parametrize("module", ["flax", "optax", "torch", "sklearn", "matplotlib"])
def test_import_is_light(module):
    code = f"import sys, jnorm; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


def test_import_does_not_start_a_backend():
    """Flags such as the number of devices can still be set after the import."""
    code = "import jax, jnorm; jax.config.update('jax_num_cpu_devices', 3); assert len(jax.devices()) == 3"
    subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def trees():
    return {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imported_layers(path, tree):
    """The layers of jnorm that a file imports, absolute or relative."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = ["jnorm", *path.parts[: len(path.parts) - node.level]] if node.level else []
            root, *inner = [*base, *filter(None, (node.module or "").split("."))]
            if root == "jnorm":
                yield from inner[:1] or [a.name for a in node.names]
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("jnorm."))


def layer_of(path):
    return path.parts[0].removesuffix(".py")


def test_imports_go_one_way():
    wrong = []
    for path, tree in trees().items():
        if path.name == "__init__.py" and len(path.parts) == 1:
            continue
        level = next(i for i, names in enumerate(LEVELS) if layer_of(path) in names)
        allowed = set().union(*LEVELS[:level], {layer_of(path)})
        wrong += [f"{path} imports {name}" for name in imported_layers(path, tree) if name in LAYERS - allowed]
    assert not wrong


def test_every_file_is_in_a_layer():
    assert {layer_of(p) for p in trees()} - {"__init__"} <= LAYERS


def test_flax_is_for_the_modules():
    imports = {
        layer_of(path)
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if name.split(".")[0] == "flax" and not getattr(node, "level", 0)
    }
    assert imports == {"linen", "nnx", "tools"}


def test_norms_do_not_name_collectives():
    """Named collectives are in _stats.py only."""
    found = set()
    for path, tree in trees().items():
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
            if name in COLLECTIVES:
                found.add(str(path))
    assert found == {"_stats.py"}


def test_jax_internals_are_in_one_file():
    modules = {
        (str(path), node.module or "") for path, tree in trees().items() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    found = {path for path, module in modules if module.startswith("jax._src")}
    assert found <= {"_jax_internals.py"}


def test_no_file_is_long():
    long = {str(p): n for p in trees() if (n := len((PACKAGE / p).read_text().splitlines())) > LONGEST.get(layer_of(p), 300)}
    assert not long


def has_entry(parameter, text):
    return re.search(rf"^\s*([*\w]+, )*[*]*{parameter}(, [*\w]+)*( \([^)]*\))?:", text, re.M)


@pytest.mark.parametrize("function", [*(getattr(jnorm, n) for n in FUNCTIONS), *REPARAMETRIZATIONS, *TOOLS], ids=lambda f: f.__name__)
def test_docstring(function):
    text = inspect.getdoc(function)
    assert text and text.splitlines()[0].endswith(".")
    for section in ("Args:", "Returns:", ">>>"):
        assert section in text, section
    assert [n for n in inspect.signature(function).parameters if not has_entry(n, text)] == []


def constructor_arguments(cls):
    """For Linen its own fields; the metaclass of NNX hides the signature of the constructor."""
    return [n for n in inspect.signature(cls.__init__).parameters if n not in ("self", "parent", "name")]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: f"{c.__module__.split('.')[1]}.{c.__name__}")
def test_docstring_of_a_module(cls):
    text = inspect.getdoc(cls)
    assert text and ":func:`jnorm." in text.splitlines()[0] and ">>>" in text
    assert [n for n in constructor_arguments(cls) if not has_entry(n, text)] == []
    assert inspect.getdoc(cls.__call__)


def test_linen_and_nnx_mirror_each_other():
    assert jnorm.linen.__all__ == jnorm.nnx.__all__ == sorted(jnorm.nnx.__all__)
    assert {p.name for p in (PACKAGE / "linen").glob("*.py")} == {p.name for p in (PACKAGE / "nnx").glob("*.py")}


@pytest.mark.parametrize(
    "function",
    [
        *(getattr(jnorm, n) for n in [*NORMS, *WITHOUT_STATISTICS, "normalize"]),
        *(f for f in REPARAMETRIZATIONS if not f.__name__.endswith("_state")),
    ],
    ids=lambda f: f.__name__,
)
def test_docstring_of_a_norm(function):
    text = inspect.getdoc(function)
    for section in ("math", "Raises:", "Numerics:", "Distributed:", "References:"):
        assert section in text, section
    assert re.search(r"arxiv|arXiv|http", text)


@pytest.mark.parametrize("name", NORMS)
def test_options_are_keyword_only(name):
    kinds = {p.name: p.kind for p in inspect.signature(getattr(jnorm, name)).parameters.values()}
    positional = {n for n, k in kinds.items() if k is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert positional <= {"x", "state", "scale", "bias"} | ({"residual"} if name.startswith("add_") else set())
    assert {"mask", "axis_name", "axis_index_groups", "dtype", "feature_axes"} <= set(kinds)
    assert {"epsilon", "sigma"} & set(kinds) or name in DIVIDES_BY_NOTHING


DEFAULTS = {
    "batch_norm": {
        "momentum": 0.99,
        "epsilon": 1e-5,
        "use_running_average": False,
        "update_running": None,
        "running_var_correction": 0,
        "feature_axes": -1,
    },
    "cross_iteration_batch_norm": {"epsilon": 1e-5, "momentum": 0.99, "window_size": None, "compensation": 1.0, "rule": "max"},
    "divisive_batch_norm": {"sigma": 1.0, "momentum": 0.99, "running_var_correction": 0, "feature_axes": -1},
    "divisive_norm": {"sigma": 1.0, "suppression_field": None, "border": "zero", "feature_axes": -1},
    "add_layer_norm": {"epsilon": 1e-6, "reduction_axes": -1, "feature_axes": -1},
    "add_rms_norm": {"epsilon": 1e-6, "reduction_axes": -1, "feature_axes": -1},
    "layer_norm": {"epsilon": 1e-6, "reduction_axes": -1, "feature_axes": -1},
    "rms_norm": {"epsilon": 1e-6, "reduction_axes": -1, "feature_axes": -1},
    "group_norm": {"epsilon": 1e-6, "num_groups": None, "group_size": None, "reduction_axes": None},
    "instance_norm": {"epsilon": 1e-6, "reduction_axes": None},
    "filter_response_norm": {"epsilon": 1e-6, "learned_epsilon": None, "reduction_axes": None, "feature_axes": -1},
    "local_response_norm": {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 1.0, "divide_alpha": True, "window_axes": -1},
    "thresholded_linear_unit": {"feature_axes": -1},
    "cross_mini_batch_norm": {"gradient": "exact", "update": "each", "momentum": 0.99, "epsilon": 1e-5, "running_var_correction": 0},
    "standardize_features": {"correction": 0, "minimum_std": 0.0, "feature_axes": -1, "dtype": None},
    "tracked_instance_norm": {"epsilon": 1e-6, "momentum": 0.99, "running_var_correction": 0},
    "eval_norm": {"var_weight": None, "epsilon": 1e-5, "reduction_axes": None, "feature_axes": -1},
    "ghost_batch_norm": {"grouping": "consecutive", "remainder": "error", "update": "mean", "momentum": 0.99, "epsilon": 1e-5},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    parameters = inspect.signature(getattr(jnorm, name)).parameters
    assert {k: parameters[k].default for k in DEFAULTS[name]} == DEFAULTS[name]


# The examples of these modules need another library.
NEEDS = {"_torch": "torch", "_models": "torch", "_keras": "keras", "_haiku": "haiku", "_equinox": "equinox"}


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    """Under the conftest's strict promotion: a documented example is what users copy."""
    if "convert" in module and (library := NEEDS.get(module.rpartition(".")[2])):
        pytest.importorskip(library)
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_some_doctests_ran():
    assert sum(len(t.examples) for m in MODULES for t in doctest.DocTestFinder().find(importlib.import_module(m))) >= 2 * len(FUNCTIONS)


def test_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert jnorm.__version__ == version
    assert re.search(rf"^## \[?{re.escape(version)}", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()

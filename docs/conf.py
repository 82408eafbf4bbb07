"""Sphinx configuration: `sphinx-build -W --keep-going -n -b html docs docs/_build`."""

import inspect
import types
from typing import Any

import jnorm

project = "jnorm"
author = "The jnorm authors"
copyright = "The jnorm authors"  # noqa: A001
version = release = jnorm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore = [
    # Built-in names in "Raises:". No inventory of Python's documentation is loaded, so
    # that a build needs no network.
    ("py:exc", "ValueError"),
    ("py:exc", "TypeError"),
    ("py:class", "dict"),  # the base of a TypedDict
    ("py:class", "TypedDict"),
    ("py:class", "typing.TypedDict"),
    # Inherited from nnx.Module, and not listed here.
    ("py:meth", "train"),
    ("py:meth", "eval"),
]

html_theme = "furo"
html_title = f"jnorm {release}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]

# Single backticks in docstrings are code, as in Markdown.
default_role = "literal"
add_module_names = True
maximum_signature_line_length = 88

autodoc_member_order = "bysource"
# Types and shapes are in "Args:", and jnorm.typing says what Axes and Mask are;
# annotations would make signatures unreadable.
autodoc_typehints = "none"

napoleon_numpy_docstring = False
# "Returns" as text: its first words are no type.
napoleon_custom_sections = ["Returns", "Numerics", "Distributed"]
napoleon_use_rtype = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Fields that every Linen module inherits.
INHERITED = {"self", "parent", "name"}


def show_default(value: Any) -> str:
    """`ones` for an initializer, `float32` for a dtype: repr would give addresses."""
    if (
        isinstance(value, types.FunctionType)
        or inspect.isclass(value)
        or hasattr(value, "__name__")
    ):
        return value.__name__
    if type(value).__name__ in ("FrozenDict", "FrozenSet", "frozenset"):
        return "{" + ", ".join(map(repr, sorted(value))) + "}"
    if type(value).__name__ == "mappingproxy":
        return "{}"
    return repr(value)


def signature_of(function: Any) -> str:
    """Names and defaults, without annotations."""
    shown = []
    signature = inspect.signature(function)
    keyword_only = any(
        p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()
    )
    for parameter in signature.parameters.values():
        if parameter.name in INHERITED:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(
            parameter.kind, ""
        )
        default = (
            ""
            if parameter.default is parameter.empty
            else f"={show_default(parameter.default)}"
        )
        shown.append(f"{stars}{parameter.name}{default}")
    return f"({', '.join(shown)})"


def process_signature(
    app: Any,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: Any,
    annotation: Any,
) -> tuple | None:
    if what == "class" and issubclass(obj, dict | tuple):
        return "", ""  # dicts and tuples, whose fields are listed below them
    if what == "class":
        return signature_of(obj.__init__), ""
    if what in ("function", "method"):
        return signature_of(obj), ""
    return None


def setup(app: Any) -> None:
    app.connect("autodoc-process-signature", process_signature)

"""The documentation: the code of every page runs as it stands, and every public name is on a page of the API."""

import re
import textwrap
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if "_build" not in p.parts)


def run(page):
    """The Python blocks of a page, in order, in one namespace, with the lines of the page in a traceback."""
    text, names = (DOCS / page).read_text(), {"__name__": "__docs__"}
    for block in re.finditer(r"^( *)```python\n(.*?)^ *```$", text, re.M | re.S):
        line = text[: block.start(2)].count("\n")
        exec(compile("\n" * line + textwrap.dedent(block[2]), str(DOCS / page), "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    run(page)

"""A run in the terminal, and as Markdown."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .sections import sections


def facts(found: dict[str, Any]) -> list[str]:
    """What every report starts with."""
    run = next(iter(found.values()))
    m, kernels = run["machine"], run["kernels"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if v != "missing")
    lines = [
        f"{m['device']}: {m['processor']}, {m['cores']} cores, last-level cache {m['last_level_cache'] / 2**20:.0f} MiB, {m['system']}",
        f"jnorm at commit {m['commit']}; kernels: {kernels['active']} {kernels.get('isa', '')} ({kernels['reason']})",
        versions,
        f"Allocators: {', '.join(found)} (the first where none is named); {run['rounds']} interleaved rounds each",
    ]
    for allocator, one in found.items():
        if "memory_bandwidth" in one:
            measured = ", ".join(f"{v['best'] / 1e9:.1f} GB/s {when}" for when, v in one["memory_bandwidth"].items())
            dropped = sum(r["rounds_dropped"] for r in one["rows"])
            lines.append(f"Copy bandwidth of memory ({allocator}): {measured}; {dropped} rounds dropped for steal")
    lines += [f"`python -m benchmarks {one['command']}` ({allocator})" for allocator, one in found.items() if "command" in one]
    if run["missing"]:
        lines.append(f"Missing, so not compared: {', '.join(run['missing'])}")
    out = {f"{n}: {p['left_out']}" for r in run["rows"] for n, p in r["peers"].items() if "left_out" in p}
    lines += [f"Left out where it cannot: {text}" for text in sorted(out)]
    lines += [f"WRONG ({allocator}): {text}" for allocator, one in found.items() for text in one["failures"]]
    return lines


def show(found: dict[str, Any]) -> None:
    console = Console()
    console.width = max(console.width, 170)
    for line in facts(found):
        console.print(escape(line), soft_wrap=True)
    for section in sections(found):
        table = Table(title=section.title, caption=escape(section.note), title_style="bold", caption_justify="left")
        for i, column in enumerate(section.columns):
            table.add_column(escape(column), justify="right" if i else "left", no_wrap=not i)
        for row in section.rows:
            table.add_row(*(styled(cell) for cell in row))
        console.print(table)


def styled(cell: str) -> str:
    if cell.endswith(" no") or cell == "slower":
        return f"[red]{escape(cell)}[/red]"
    return escape(cell)


def page(found: dict[str, Any]) -> str:
    """The page of the documentation: what is always true, and this run."""
    return (Path(__file__).parent / "page.md").read_text(encoding="utf-8") + markdown(found)


def markdown(found: dict[str, Any]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    parts = ["\n".join(f"- {fact}" for fact in facts(found))]
    for section in sections(found):
        ruler = ["---", *["---:"] * (len(section.columns) - 1)]
        table = [line(section.columns), line(ruler), *map(line, section.rows)] if section.rows else ["Nowhere."]
        parts.append(f"## {section.title}\n\n{section.note}\n\n" + "\n".join(table))
    return "\n\n".join(parts) + "\n"

"""The Markdown table of what was measured on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.benchmarks.report import stamp

_COLUMNS = (
    "method",
    "ms (quartiles)",
    "/ LoRA",
    "/ LoRA by hand",
    "/ PEFT's DoRA",
    "/ PEFT's LoRA",
    "peak GB",
    "compile s",
)
_OVER = ("lora", "lora-by-hand", "peft-dora", "peft-lora")


def write_table(results: Mapping[str, Any], folder: Path) -> str:
    """Writes `gpu.md`, and returns it.

    Args:
        results: Each part by name: its title, and `rows`, `figures`, `lines`, `error` or
            `left_out`.
        folder: Where to write.
    """
    made = stamp()
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    blocks = [
        "# DoRA on a GPU",
        f"{made['device']}; {made['machine']}; {versions}; {made['time']}.",
    ]
    for part in results.values():
        blocks += [f"## {part['title']}", _content(part)]
    text = "\n\n".join(blocks) + "\n"
    (folder / "gpu.md").write_text(text, encoding="utf-8")
    return text


def _content(part: Mapping[str, Any]) -> str:
    if "rows" in part:
        lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
        return "\n".join(lines + [_line(_cells(row)) for row in part["rows"].values()])
    if "figures" in part:
        return "\n".join(f"- {name}: {value:.3g}" for name, value in part["figures"].items())
    if "lines" in part:
        return "\n".join(f"- {line}" for line in part["lines"])
    return f"Not measured: {part.get('error') or part.get('left_out')}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["seconds_quartiles"]
    cells = [row["title"], f"{1e3 * row['seconds']:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})"]
    over = row.get("over", {})
    cells += [_ratio(over[name]) if name in over else "" for name in _OVER]
    others = [f"{_ratio(value)} of {name}" for name, value in over.items() if name not in _OVER]
    if others:
        cells[2] = ", ".join(others)
    peak, compiled = row.get("peak_bytes"), row.get("compile_seconds")
    cells += ["" if peak is None else f"{peak / 1e9:.2f}"]
    return [*cells, "" if compiled is None else f"{compiled:.1f}"]


def _ratio(ratio: Mapping[str, Any]) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.3f} ({low:.3f} to {high:.3f})"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"

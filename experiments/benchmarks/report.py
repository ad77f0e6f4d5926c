"""Writes the report of the benchmark: Markdown, JSON and plots."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.plots import plot_ratios, plot_scaling
from experiments.benchmarks.targets import TARGETS

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "torch", "peft", "transformers")

Row = Mapping[str, Any]


def stamp() -> dict[str, Any]:
    """Returns the conditions of a measurement: command, time, machine, load and versions."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": f"python -m experiments.efficiency {shlex.join(sys.argv[1:])}".strip(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_processor()}, {os.cpu_count()} CPUs",
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def write_report(results: Mapping[str, Any], folder: Path) -> str:
    """Writes `efficiency.json`, `efficiency.md` and the plots, and returns the Markdown.

    Args:
        results: Nested by part of the benchmark (`train`, `inference`, `scaling`,
            `ahead_of_time`, `abstract`), by backend or target, and by case, curve or table.
        folder: Where to write. It is made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = ["# What DoRA costs", *_targets(results)]
    for backend, cases in results.get("train", {}).items():
        picture = f"efficiency_steps_{backend}.png"
        plot_ratios(cases, folder / picture)
        blocks += [f"## Training steps on {backend}", _STEPS_NOTE]
        blocks += _cases(cases, _STEP_COLUMNS)
        blocks += [f"![training steps]({picture})"]
    for backend, cases in results.get("inference", {}).items():
        blocks += [f"## Inference on {backend}", *_cases(cases, _INFERENCE_COLUMNS)]
    for target, tables in results.get("ahead_of_time", {}).items():
        blocks += [f"## Compiled ahead of time for {target}", _COMPILED_NOTE]
        for table in tables.values():
            blocks += [f"### {table['title'][0].upper() + table['title'][1:]}", _setting(table)]
            blocks += [_table(table["rows"].values(), _COMPILED_COLUMNS), _stamp_line(table)]
    for backend, curves in results.get("scaling", {}).items():
        picture = f"efficiency_scaling_{backend}.png"
        plot_scaling(curves, folder / picture)
        blocks += [f"## Scaling on {backend}", _SCALING_NOTE, f"![scaling]({picture})"]
        blocks += [_curve(name, curve) for name, curve in curves.items()]
        blocks += dict.fromkeys(_stamp_line(curve) for curve in curves.values())
    for models in results.get("abstract", {}).values():
        rows = [{"title": name, **row} for name, row in models.items()]
        blocks += ["## Adapting an abstract LLaMA-7B", _table(rows, _ABSTRACT_COLUMNS)]
        blocks += dict.fromkeys(_stamp_line(row) for row in rows)
    text = "\n\n".join(blocks) + "\n"
    (folder / "efficiency.md").write_text(text, encoding="utf-8")
    (folder / "efficiency.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return text


_STEPS_NOTE = (
    "A step is forward, gradient of what is trained, clipping and AdamW. Steps of all methods are "
    "taken in turn in one process, in an order that changes from round to round. Times: median "
    "(first to third quartile). Ratios: median of the ratios of all rounds, to LoRA with as many "
    "microbatches. Memory: arguments, results and temporaries of the compiled step, or the peak of "
    "the device's allocator, if it counts. The process keeps freed memory, for JAX and for PEFT "
    "(`experiments/trainer/memory.py`), unless the command says `--no-keep-freed-memory`."
)

_SCALING_NOTE = (
    "DoRA over LoRA: measured (median and quartiles of the ratios), operations of the compiled "
    "step, and the model 1 + r / N of an exact gradient, N being the tokens of a step. The "
    "last panel shows compile time against depth."
)

_COMPILED_NOTE = (
    "Per device. `bytes` also counts reads from and writes to VMEM, and each slice that is "
    "prefetched into it as a read of the whole array. The table without VMEM prefetch counts every "
    "operand once."
)


def _targets(results: Mapping[str, Any]) -> list[str]:
    lines = ["| target | at most | measured | |", "|---|---|---|---|"]
    for target in TARGETS:
        value = target.measured(results)
        shown, met = "not measured", ""
        if value is not None:
            shown, met = f"{value:.5g}", "met" if value <= target.bound else "**missed**"
        lines.append(f"| {target.name} | {target.bound:g} | {shown} | {met} |")
    definitions = [f"- {target.name}: {target.definition}." for target in TARGETS]
    return ["## Targets", "\n".join(lines), "\n".join(definitions)]


def _cases(cases: Mapping[str, Any], columns: Mapping[str, Callable[[Row], str]]) -> Iterator[str]:
    for case in cases.values():
        yield f"### {case['title']}"
        yield _table(case["rows"].values(), columns)
        yield _stamp_line(case)


def _setting(table: Mapping[str, Any]) -> str:
    setting = table["setting"]
    return (
        f"{table['devices']} x {table['device']}; LLaMA of width "
        f"{setting['shape']['hidden_size']}, {setting['length']} tokens a device, rank "
        f"{setting['rank']}, {setting['dtype']} base ({setting['sharding']}), float32 adapters; "
        f"{setting['layers']} layers where there is a scan, {setting['microbatches']} "
        "microbatches where there are any."
    )


def _stamp_line(item: Mapping[str, Any]) -> str:
    made = item["stamp"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    load = made["load_average"]
    busy = "" if load is None else f", load average {load:.1f} at the start"
    return (
        f"Made by `{made['command']}`, {made['time']}, on {made['machine']} "
        f"({made['device']}){busy}; {versions}."
    )


def _ratio(name: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        ratio = row.get(name)
        if not ratio:
            return ""
        low, high = ratio["quartiles"]
        return f"{ratio['median']:.3f} ({low:.3f} to {high:.3f})"

    return show


def _peer(row: Row) -> str:
    return ", ".join(_ratio(peer)(row["over_peer"]) for peer in row.get("over_peer", {}))


def _curve(name: str, curve: Mapping[str, Any]) -> str:
    """Returns the table of a curve, a row for each of its points."""
    points, columns = curve["points"], {curve["axis"]: _number("x", "d")}
    if name == "compile":
        columns |= {f"{way} (s)": _number(way, ".1f") for way in points[0] if way != "x"}
    else:
        columns |= _overhead_columns("dora", "exact")
        columns |= _overhead_columns("dora-detached", "detached")
    return _table(points, columns)


def _overhead_columns(variant: str, title: str) -> dict[str, Callable[[Row], str]]:
    """Returns columns for the measured, the counted and the expected overhead."""
    shown = {
        title: _ratio("over_lora"),
        f"{title}, operations": _number("flops_over_lora", ".3f"),
        f"{title}, model": _number("expected", ".3f"),
    }
    return {
        column: functools.partial(lambda show, point: show(point[variant]), show)
        for column, show in shown.items()
    }


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else format(value if scale == 1 else value * scale, form)

    return show


def _milliseconds(row: Row) -> str:
    low, high = (1e3 * x for x in row["seconds_quartiles"])
    return f"{1e3 * row['seconds']:.4g} ({low:.4g} to {high:.4g})"


def _over_lora(name: str) -> Callable[[Row], str]:
    return lambda row: format(row["over_lora"].get(name, float("nan")), ".4f")


_TITLE = {"": lambda row: row["title"]}
_STEP_COLUMNS = {
    **_TITLE,
    "ms per step": _milliseconds,
    "tokens/s": _number("tokens_per_second", ",.0f"),
    "over LoRA": _ratio("over_lora"),
    "over LoRA by hand": _ratio("over_by_hand"),
    "over PEFT": _peer,
    "memory (MB)": _number("peak_bytes", ",.1f", 1e-6),
    "trainable": _number("trainable_parameters", ",.0f"),
    "compile (s)": _number("compile_seconds", ".2f"),
}
_INFERENCE_COLUMNS = {
    **_TITLE,
    "ms per call": _milliseconds,
    "tokens/s": _number("tokens_per_second", ",.0f"),
    "over LoRA": _ratio("over_lora"),
    "over base": _ratio("over_base"),
    "FLOPs over base": _number("flops_over_base", ".4f"),
    "memory (MB)": _number("peak_bytes", ",.1f", 1e-6),
    "two calls, same bits": lambda row: "yes" if row["repeats_bit_for_bit"] else "**no**",
}
_COMPILED_COLUMNS = {
    **_TITLE,
    "TFLOP": _number("flops", ".4f", 1e-12),
    "over LoRA": _over_lora("flops"),
    "bytes (GB)": _number("bytes_accessed", ".3f", 1e-9),
    "over LoRA ": _over_lora("bytes_accessed"),
    "temporaries (GB)": _number("temporary_bytes", ".4f", 1e-9),
    "over LoRA  ": _over_lora("temporary_bytes"),
    "compile (s)": _number("compile_seconds", ".1f"),
}
_ABSTRACT_COLUMNS = {
    **_TITLE,
    "kernels": _number("kernels", ".0f"),
    "trainable": _number("trainable_parameters", ",.0f"),
    "seconds": _number("seconds", ".2f"),
    "peak memory of the process (GB)": _number("peak_gb", ".3f"),
    "before (GB)": _number("peak_gb_before", ".3f"),
}


def _table(rows: Iterable[Row], columns: Mapping[str, Callable[[Row], str]]) -> str:
    """Returns a Markdown table, without the columns that are empty in every row."""
    rows = list(rows)
    cells = {name: [show(row) for row in rows] for name, show in columns.items()}
    cells = {name: values for name, values in cells.items() if any(values)}
    lines = ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]
    lines += ["| " + " | ".join(values) + " |" for values in zip(*cells.values(), strict=True)]
    return "\n".join(lines)


def _processor() -> str:
    """Returns the name of the processor. On Linux `platform` does not know it."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

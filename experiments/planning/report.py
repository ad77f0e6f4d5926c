"""A plan as text, and as JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from experiments.planning.collectives import totals
from experiments.planning.compiler import Counts
from experiments.planning.estimate import ASSUMPTIONS, Times, estimate_times, largest_batch
from experiments.planning.program import Setting
from experiments.planning.slices import DEVICES, USABLE, Device


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a step.

    Attributes:
        title: The model and its layers.
        setting: The step.
        target: The slice.
        mesh: The size of each axis.
        counts: What was counted in its program.
        other: Sequences of a device in a second program, and its bytes; None if there is none.
    """

    title: str
    setting: Setting
    target: str
    mesh: dict[str, int]
    counts: Counts
    other: tuple[int, int] | None

    @property
    def device(self) -> Device | None:
        """The published figures of the device; None if there are none, as for a CPU."""
        return DEVICES.get(self.counts.device_kind)

    @property
    def limit(self) -> float | None:
        """Bytes that a program may have on a device."""
        return None if self.device is None else USABLE * self.device.hbm_gb * 2**30

    @property
    def fits(self) -> bool | None:
        """Whether the step fits. None where the memory is not known."""
        return None if self.limit is None else self.counts.memory.total <= self.limit

    @property
    def times(self) -> Times | None:
        """The estimate of the time of a step that fits."""
        if self.device is None or not self.fits:
            return None
        counts = self.counts
        return estimate_times(
            self.device, counts.operations, counts.memory, counts.collectives, self.mesh
        )

    @property
    def most_rows(self) -> int | None:
        """How many sequences of a device fit."""
        if self.limit is None or self.other is None:
            return None
        rows, size = self.other
        totals = (self.counts.memory.total, size)
        return largest_batch((self.setting.rows, rows), totals, self.limit)

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures: bytes and operations of one device, seconds."""
        counts = dataclasses.asdict(self.counts)
        counts["collectives"] = [
            {**dataclasses.asdict(one), "bytes": one.bytes} for one in self.counts.collectives
        ]
        counts["memory"]["total"] = self.counts.memory.total
        return {
            "title": self.title,
            "setting": dataclasses.asdict(self.setting),
            "target": self.target,
            "mesh": self.mesh,
            "fits": self.fits,
            "limit": self.limit,
            "most_rows": self.most_rows,
            "times": None if self.times is None else dataclasses.asdict(self.times),
            "assumptions": ASSUMPTIONS,
            "totals": totals(self.counts.collectives),
            **counts,
        }


def text_of(plan: Plan) -> str:
    """Returns the plan for a reader."""
    return "\n".join([*_head(plan), *_memory(plan), *_work(plan), *_time(plan), *_batch(plan)])


def _gb(size: float) -> str:
    return f"{size / 1e9:8.2f} GB"


def _head(plan: Plan) -> Iterator[str]:
    setting, counts = plan.setting, plan.counts
    copies = plan.mesh["data"] * plan.mesh["fsdp"]
    axes = ", ".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1)
    yield f"{plan.title}, {setting.method} r {setting.rank}, {setting.dtype}, {setting.remat}"
    yield f"  on {plan.target} ({counts.device_kind}), mesh {axes or 'of one device'}"
    yield f"  batch {copies * setting.rows} x {setting.tokens} tokens, {setting.rows} to a device"
    yield f"  {counts.trainable:,} trained parameters; {counts.attention}"


def _memory(plan: Plan) -> Iterator[str]:
    counts = plan.counts
    verdict = {None: "", True: "fits", False: "DOES NOT FIT"}[plan.fits]
    yield ""
    yield f"Memory of a device: {verdict}".rstrip(": ")
    yield f"  frozen weights  {_gb(counts.frozen)}"
    yield f"  adapters        {_gb(counts.adapters)}"
    yield f"  moments         {_gb(counts.moments)}"
    padding = counts.memory.arguments - counts.frozen - counts.adapters - counts.moments
    yield f"  batch, padding  {_gb(padding)}"
    yield f"  temporaries     {_gb(counts.memory.temporaries)}"
    yield f"  total           {_gb(counts.memory.total)}" + (
        "" if plan.limit is None else f"   of {plan.limit / 1e9:.2f} GB that a program may have"
    )
    if plan.fits is False:
        yield from (f"  - {advice}" for advice in advice_for(plan))


def advice_for(plan: Plan) -> Iterator[str]:
    """Yields what makes a step smaller that does not fit, from the least loss of speed on."""
    setting, counts = plan.setting, plan.counts
    assert plan.limit is not None
    kept = counts.frozen + counts.adapters + counts.moments
    if kept > plan.limit:
        times = -(-kept // int(plan.limit))
        yield (
            f"weights, adapters and moments alone are too large: {times} times as many devices "
            "on fsdp or tensor, or a quantised base"
        )
        return
    if setting.remat not in ("full", "save_scaled"):
        yield "keep less for the backward pass: --remat save_scaled"
    if setting.rows > 1:
        fewer = plan.most_rows
        yield f"fewer sequences at once: --rows {max(1, fewer or 1)}, and microbatches"
    if plan.mesh["data"] > 1:
        yield "cut the weights over the devices of data too: give them to fsdp"
    if counts.frozen > 0.3 * plan.limit:
        yield "a larger slice with more devices on fsdp, or a quantised base"
    yield "cut each product and the saved activations: more devices on tensor, fewer on fsdp"
    yield f"shorter sequences: --tokens {setting.tokens // 2}"


def _work(plan: Plan) -> Iterator[str]:
    counts = plan.counts
    yield ""
    yield f"Work of a step: {counts.operations / 1e12:.2f} TFLOP a device, in products"
    if plan.fits is False and not counts.collectives:
        return  # XLA refused it
    yield ""
    yield "Collectives of a step, loops multiplied out; bytes of the whole arrays"
    found = totals(counts.collectives)
    for kind, (number, size) in sorted(found.items()):
        yield f"  {kind:<20}{number:>8} {_gb(size)}"
    number, size = (sum(pair[i] for pair in found.values()) for i in (0, 1))
    weights = f"{counts.gathered / 1e9:.2f} GB of them frozen weights"
    yield f"  {'all':<20}{number:>8} {_gb(size)}, {weights}"


def _time(plan: Plan) -> Iterator[str]:
    times, device = plan.times, plan.device
    if times is None or device is None:
        return
    yield ""
    yield f"Time of a step: {times.least:.3f} s if all overlaps, {times.most:.3f} s if nothing does"
    yield f"  products  {times.products:.3f} s at {device.teraflops:g} TFLOP/s"
    yield f"  HBM       {times.memory:.3f} s at {device.hbm_gbps:g} GB/s"
    yield f"  network   {times.network:.3f} s at {device.link_gbps:g} GB/s out of a device"
    tokens = plan.setting.rows * plan.setting.tokens * plan.mesh["data"] * plan.mesh["fsdp"]
    yield f"  at most {tokens / times.least:,.0f} tokens/s. An estimate, not measured. It assumes:"
    for one in (f"figures of {device.source}", *ASSUMPTIONS):
        yield textwrap.fill(one, 96, initial_indent="  - ", subsequent_indent="    ")


def _batch(plan: Plan) -> Iterator[str]:
    if plan.most_rows is None or plan.other is None:
        return
    yield ""
    yield (
        f"Largest batch: {plan.most_rows} sequences to a device, on the line through the programs "
        f"of {plan.setting.rows} and {plan.other[0]}"
    )

"""The commands of `dora-jax`, as tyro reads them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dora_jax.cli.convert import convert
from dora_jax.cli.diff import diff
from dora_jax.cli.inspect import inspect, percent
from dora_jax.cli.merge import merge
from dora_jax.names.architectures import NAME_MAPS
from dora_jax.names.name_map import NameMap
from dora_jax.names.torch_layout import NameMapError

Names = Literal["identity", "bert", "roberta", "llama", "mistral", "qwen2", "qwen3"]


def _path(words: list[str]) -> Path:
    if not words[0].strip():  # as an unset variable of a shell gives; Path("") is Path(".")
        raise ValueError("the path is empty: is a variable unset?")
    return Path(words[0])


_PATH: Any = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH",
    instance_from_str=_path,
    is_instance=lambda value: value is None or isinstance(value, Path),
    str_from_instance=lambda path: [str(path)],
)
GivenPath = Annotated[Path, _PATH]
Folder = Annotated[GivenPath, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
Source = Annotated[GivenPath, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
BaseFolder = Annotated[GivenPath, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
AdapterFolder = Annotated[GivenPath, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
Target = Annotated[GivenPath, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show an adapter folder: its layers, their ranks, and how far the magnitudes moved.

    The drift of a magnitude is |m - ||W0||| / ||W0||; shown are its mean and maximum over a layer.
    """

    folder: Folder
    """An adapter folder of dora_jax or PEFT, or one step of a training run's checkpoints."""
    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        _print(*inspect(self.folder), self.json)
        return 0


@dataclasses.dataclass(frozen=True)
class Diff:
    """Compare two adapters, layer by layer. The exit status is 0 if they are equal, else 1.

    Differences are relative to the larger of the two norms: ||s A B - s' A' B'|| for the direction,
    ||m - m'|| for the magnitude.
    """

    first: Folder
    """An adapter folder."""
    second: Folder
    """Another one of the same format."""
    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        report, text = diff(self.first, self.second)
        _print(report, text, self.json)
        return 0 if report["equal"] else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class NameOptions:
    """Options that change a name map."""

    flax_prefix: str = ""
    """Path of the submodule of the Flax model that has these names, such as encoder."""
    hf_prefix: str = ""
    """Path of that submodule in the Hugging Face model, such as bert."""
    extra_names: tuple[str, ...] = ()
    """Further modules, as pairs of a Flax and a Hugging Face path, such as classifier=score."""

    def name_map(self, name: str) -> NameMap:
        """Returns the name map of an architecture with these options."""
        names = NAME_MAPS[name]
        if self.flax_prefix or self.hf_prefix:
            names = names.inside(self.flax_prefix, self.hf_prefix)
        pairs = {extra: extra.partition("=") for extra in self.extra_names}
        if wrong := [extra for extra, (flax, _, theirs) in pairs.items() if not (flax and theirs)]:
            raise NameMapError(
                f"--extra-names takes pairs such as classifier=score, got {wrong[0]!r}"
            )
        return names | {flax: theirs for flax, _, theirs in pairs.values()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(NameOptions):
    """Write an adapter in the other format: Orbax to PEFT, or PEFT to Orbax."""

    source: Source
    """The adapter folder to read."""
    target: Target
    """The folder to write."""
    names: Names
    """Which Hugging Face module each Flax module is; "identity" if their paths are the same."""
    base: Annotated[Path | None, _PATH] = None
    """Hugging Face folder of the base. An Orbax adapter is checked against it. A PEFT adapter is
    saved with its fingerprint, so that it loads without a warning."""
    allow_base_mismatch: Flag = False
    """Convert an adapter that was trained for another base, too."""
    overwrite: Flag = False
    """Replace the contents of the target."""
    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        report = convert(
            self.source,
            self.target,
            self.name_map(self.names),
            base=self.base,
            allow_base_mismatch=self.allow_base_mismatch,
            overwrite=self.overwrite,
        )
        _print(
            report, f"{self.source} ({report['from']}) -> {self.target} ({report['to']})", self.json
        )
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(NameOptions):
    """Merge an adapter into the weights of its base, from one Hugging Face folder to another.

    No model is needed. Weights are read, merged and written one by one.
    """

    base: BaseFolder
    """Hugging Face folder of the base, with safetensors files."""
    adapter: AdapterFolder
    """An adapter folder."""
    target: Target
    """The folder to write."""
    names: Names | None = None
    """Which Hugging Face module each Flax module is; needed for an Orbax adapter."""
    allow_base_mismatch: Flag = False
    """Merge an adapter that was trained for another base, too."""
    max_file_bytes: int = 2 * 10**9
    """Largest size of a file of weights, in bytes."""
    overwrite: Flag = False
    """Replace the weights in the target."""
    json: Flag = False
    """Print JSON."""

    def run(self) -> int:
        """Runs the command; returns the exit status."""
        names = None if self.names is None else self.name_map(self.names)
        report = merge(
            self.base,
            self.adapter,
            self.target,
            names,
            max_file_bytes=self.max_file_bytes,
            allow_base_mismatch=self.allow_base_mismatch,
            overwrite=self.overwrite,
        )
        text = f"{self.target}: {len(report['merged'])} weights merged, {report['copied']} copied"
        if report["replaced"]:
            text += f", {len(report['replaced'])} replaced"
        worst = max(report["rounded_away"].values(), default=0.0)
        if worst > 1e-3:
            text += f"\nThe base's dtype rounds away up to {percent(worst)} of a layer's change"
        _print(report, text, self.json)
        return 0


Command = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
)


def _print(report: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(_finite(report), indent=2, allow_nan=False) if as_json else text)


def _finite(value: Any) -> Any:
    """Returns a report with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value

"""The exceptions of the library; each message names the layer, field or file, and the fix."""

from __future__ import annotations

from collections.abc import Sequence

# The path of a module in its model, by names.
Path = tuple[str, ...]


class DoRAError(ValueError):
    """A request that cannot be honoured; the message names the layer or field, and the fix."""


class ConfigError(DoRAError):
    """A field of `DoRAConfig` is out of range, or a pattern in it matches nothing."""


class LayoutError(DoRAError):
    """A layer cannot be adapted because how its kernel is contracted is not known."""


class AdapterError(DoRAError):
    """Adapters and model do not belong together, or a model is adapted or merged twice."""


class CheckpointError(DoRAError):
    """A checkpoint is damaged, incomplete or of another format; the message names file or array."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file or folder of a checkpoint is not there, or something else is in its place."""


def layer_name(path: Path) -> str:
    """Returns the dotted path of a layer, as errors name it; the model may be a layer itself."""
    return ".".join(path) or "the model"


def listing(names: Sequence[str], shown: int = 5) -> str:
    """Returns the first names of a list, as errors give them, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more

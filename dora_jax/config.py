"""What to adapt and how: `DoRAConfig`, the selection of layers, and the settings of one layer."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp

Path = tuple[str, ...]
NormGradient = Literal["exact", "detached"]
Init = Literal["kaiming_uniform", "gaussian", "orthogonal", "pissa", "olora"]

ALL_LINEAR = "all-linear"


class DoRAError(ValueError):
    """A request that cannot be honoured; the message names the layer or field and the mend."""


class ConfigError(DoRAError):
    """A field of `DoRAConfig` is out of range, or a pattern in it matches nothing."""


class LayoutError(DoRAError):
    """A layer cannot be adapted because how its kernel is contracted is not known."""


class AdapterError(DoRAError):
    """Adapters and model do not belong together, or a model is adapted or merged twice."""


def layer_name(path: Path) -> str:
    """Returns the dotted path of a layer, as errors name it; the model may be a layer itself."""
    return ".".join(path) or "the model"


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """The settings of one adapted layer, resolved from a `DoRAConfig`.

    Hashable, so that it can be static under `jax.jit`. Field meanings are those of `DoRAConfig`.
    """

    rank: int
    alpha: float
    scaling: float
    dropout: float = 0.0
    magnitude_trainable: bool = True
    normalize: bool = True
    decompose: bool = True
    norm_gradient: NormGradient = "exact"
    eps: float = 1e-8
    hoisted: bool = False
    indices: tuple[int, ...] | None = None

    @property
    def has_magnitude(self) -> bool:
        """Whether the layer trains a magnitude (`decompose` and `magnitude_trainable`)."""
        return self.decompose and self.magnitude_trainable

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The arrays of the layer's adapter, in order; `scale` where the scale was hoisted."""
        low_rank = ("lora_a", "lora_b") if self.rank else ()
        if self.hoisted and self.decompose:
            return (*low_rank, "scale")
        return low_rank + (("magnitude",) if self.has_magnitude else ())


@dataclasses.dataclass(frozen=True, eq=False)
class DoRAConfig:
    r"""Which layers are adapted, and how. Frozen, validated when made, round-trips through JSON.

    Attributes:
      rank: rank r of the low-rank direction; 0 trains the magnitude alone.
      alpha: numerator of the scaling `s = alpha / rank`.
      dropout: rate applied to the input of the low-rank branch only, in [0, 1).
      target_modules: names or dotted path suffixes (`["query", "attention.value"]`), a regular
        expression that must match the whole dotted path (`r".*attention\.(query|value)"`), or
        `"all-linear"` (every dense kernel outside `modules_to_save`; not convolutions, embeddings).
      exclude_modules: modules left alone, with all inside them, although targeted; same forms as
        `target_modules`.
      rank_pattern: rank by layer; a key matches a path as `(.*\.)?(KEY)$`, the first that does
        counts.
      alpha_pattern: alpha by layer; keys match as in `rank_pattern`.
      modules_to_save: modules trained in full beside the adapters (a new head, norms); names or
        path suffixes. They live in the adapter tree and are trained by the same optimiser.
      use_rslora: scale by `alpha / sqrt(rank)` (arXiv 2312.03732) instead of `alpha / rank`.
      magnitude_trainable: False keeps the magnitude at `||W0||`.
      normalize: False keeps the denominator at `||W0||`.
      decompose: False is plain LoRA: no magnitude, no norm.
      norm_gradient: "exact" differentiates through the norm; "detached" holds it constant
        (DoRA, section 4.3; what PEFT does).
      layers_to_transform: indices of the layers adapted, out of those that `target_modules`
        selects; a layer's index is the first number in its path (`layers.3.mlp`, `block_3.mlp`),
        or the position in the outermost stack of scanned and vmapped layers.
      layers_pattern: the name that the number follows (`"layers"`), if it is not the first.
      init: how the low-rank factors start. With `lora_b` at zero, `lora_a` is drawn as
        "kaiming_uniform", `U(-1/sqrt(in), 1/sqrt(in))`, "gaussian", `N(0, 1/rank^2)` (both as in
        PEFT), or "orthogonal" (orthonormal columns). "pissa" (arXiv 2404.02948) starts from the
        largest singular vectors of the kernel, "olora" (arXiv 2406.01775) from its QR
        decomposition; the layer acts by the change of the product, so that the kernel stays the
        pretrained one and the start is an identity to rounding.
      eps: smallest norm of a kernel's column that is divided by.
      adapter_dtype: dtype of the adapter arrays. A bfloat16 magnitude does not move at usual
        learning rates, hence float32.

    Raises:
      ConfigError: naming the field and its allowed range.

    Example:
      >>> config = DoRAConfig(rank=8, target_modules=["query", "value"])
      >>> DoRAConfig.from_json(config.to_json()) == config
      True
      >>> DoRAConfig(dropout=1.0)
      Traceback (most recent call last):
      ...
      dora_jax.config.ConfigError: dropout must be in [0, 1), got 1.0
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: str | None = None
    use_rslora: bool = False
    magnitude_trainable: bool = True
    normalize: bool = True
    decompose: bool = True
    norm_gradient: NormGradient = "exact"
    init: Init = "kaiming_uniform"
    eps: float = 1e-8
    adapter_dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in ("target_modules", "exclude_modules"):
            object.__setattr__(self, field, _patterns(field, getattr(self, field)))
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save must be a list of names: [{self.modules_to_save!r}]"
            )
        object.__setattr__(
            self, "modules_to_save", _patterns("modules_to_save", self.modules_to_save)
        )
        for field in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, field, _pattern_dict(field, getattr(self, field)))
        object.__setattr__(self, "adapter_dtype", _float_dtype_name(self.adapter_dtype))
        if self.layers_to_transform is not None:
            indices = _entries("layers_to_transform", self.layers_to_transform)
            object.__setattr__(self, "layers_to_transform", indices)
        self._validate()
        for field in ("alpha", "dropout", "eps"):
            object.__setattr__(self, field, float(getattr(self, field)))
        alphas = {pattern: float(alpha) for pattern, alpha in self.alpha_pattern.items()}
        object.__setattr__(self, "alpha_pattern", alphas)

    def __eq__(self, other: object) -> bool:
        # Not by fields: of the patterns the first match counts, so their order tells two apart.
        return isinstance(other, DoRAConfig) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def _validate(self) -> None:
        _check_rank("rank", self.rank)
        _check_positive("alpha", self.alpha)
        _check_positive("eps", self.eps)
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")
        for pattern, rank in self.rank_pattern.items():
            _check_regex("rank_pattern", pattern)
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _check_regex("alpha_pattern", pattern)
            _check_positive(f"alpha_pattern[{pattern!r}]", alpha)
        for field, allowed in (("norm_gradient", NormGradient), ("init", Init)):
            if getattr(self, field) not in get_args(allowed):
                raise ConfigError(
                    f"{field} must be one of {get_args(allowed)}, got {getattr(self, field)!r}"
                )
        for field in ("use_rslora", "magnitude_trainable", "normalize", "decompose"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field} must be True or False, got {getattr(self, field)!r}")
        indices = self.layers_to_transform
        if indices is not None and (not indices or not all(_is_index(i) for i in indices)):
            raise ConfigError(
                f"layers_to_transform must hold integers of at least 0, got {list(indices)}"
            )
        if self.layers_pattern is not None and indices is None:
            raise ConfigError("layers_pattern needs layers_to_transform")
        if not isinstance(self.layers_pattern, str | None):
            raise ConfigError(
                f"layers_pattern must be one name, such as 'layers', got {self.layers_pattern!r}"
            )
        has_magnitude = self.decompose and self.magnitude_trainable
        if 0 in (self.rank, *self.rank_pattern.values()) and not has_magnitude:
            raise ConfigError(
                "rank 0 trains the magnitude alone, so it needs decompose=True and "
                "magnitude_trainable=True"
            )
        if not (self.target_modules or self.modules_to_save):
            raise ConfigError("target_modules is empty: name layers, or use 'all-linear'")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON types."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def to_json(self) -> str:
        """Returns the configuration as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @property
    def changes_product(self) -> bool:
        """Whether layers act by the change of `lora_a lora_b`, which does not start at zero."""
        return self.init in ("pissa", "olora")

    @classmethod
    def from_json(cls, text: str) -> DoRAConfig:
        """Reads what `to_json` wrote; unknown fields raise `ConfigError`."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the DoRA configuration is not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"a DoRA configuration is a JSON object, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"unknown fields {unknown}; the known ones are {sorted(known)}")
        return cls(**fields)

    def spec(self, path: Path) -> AdapterSpec:
        """Returns the settings of the layer at `path`, patterns applied."""
        name = ".".join(path)
        rank = _first_match(self.rank_pattern, name, self.rank)
        alpha = _first_match(self.alpha_pattern, name, self.alpha)
        divisor = math.sqrt(rank) if self.use_rslora else rank
        return AdapterSpec(
            rank=rank,
            alpha=alpha,
            scaling=alpha / divisor if rank else 0.0,
            dropout=self.dropout,
            magnitude_trainable=self.magnitude_trainable,
            normalize=self.normalize,
            decompose=self.decompose,
            norm_gradient=self.norm_gradient,
            eps=self.eps,
            indices=tuple(self.layers_to_transform)
            if self.layers_to_transform is not None and self.layer_index(path) is None
            else None,
        )

    def layer_index(self, path: Path) -> int | None:
        """Returns the number of the layer that a path is in, None if the path has none.

        Example:
          >>> DoRAConfig().layer_index(("layers", "3", "mlp"))
          3
        """
        numbers = []
        for i, part in enumerate(path):
            if match := re.fullmatch(r"(?:(.*)_)?(\d+)", part):
                name = match[1] or (path[i - 1] if i else "")
                if self.layers_pattern in (None, name):
                    numbers.append(int(match[2]))
        return numbers[0] if numbers else None


def select_layers(
    config: DoRAConfig,
    layers: Mapping[Path, bool],
    modules: Iterable[Path],
    refused: Mapping[Path, tuple[str, bool]] | None = None,
) -> dict[Path, AdapterSpec]:
    """Resolves which layers are adapted.

    Args:
      config: the configuration.
      layers: every layer that can be adapted, by path; True if `"all-linear"` covers it.
      modules: every module path of the model, adaptable or not (to explain a failure).
      refused: layers that hold a kernel and cannot be adapted: why, and whether `"all-linear"`
        would mean them.

    Returns:
      The settings of each selected layer, by path.

    Raises:
      LayoutError: a refused layer is meant, or a name matches only modules that hold no kernel.
      ConfigError: a pattern matches nothing (with the nearest names), or no layer is left.

    Example:
      >>> layers = {("mlp", "up"): True, ("mlp", "down"): True}
      >>> list(select_layers(DoRAConfig(target_modules=["up"]), layers, layers))
      [('mlp', 'up')]
    """
    all_names = {".".join(path) for path in modules}
    names = {".".join(path): path for path in layers}
    reasons = {".".join(path): reason for path, reason in (refused or {}).items()}
    saved = match_modules(config.modules_to_save, all_names, "modules_to_save")
    excluded = _match(config.exclude_modules, all_names, "exclude_modules", all_names)
    if config.target_modules == ALL_LINEAR:
        targets = {n for n, path in names.items() if layers[path]}
        targets |= {n for n, (_, all_linear) in reasons.items() if all_linear}
    else:
        targets = _match(config.target_modules, {*names, *reasons}, "target_modules", all_names)
    targets = {t for t in targets if not any(_is_inside(t, e) for e in saved | excluded)}
    targets = _with_indices(config, targets)
    for name in sorted(targets & reasons.keys()):
        raise LayoutError(f"{name or 'the model'} cannot be adapted: {reasons[name][0]}")
    if not targets and not saved:
        raise ConfigError(
            f"no layer matched target_modules={config.target_modules!r}. {_known(names)}"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if targets and not any(_pattern_matches(pattern, name) for name in targets):
                raise ConfigError(
                    f"{field} key {pattern!r} matches no adapted layer. {_known(targets)}"
                )
    return {names[n]: config.spec(names[n]) for n in names if n in targets}


def _with_indices(config: DoRAConfig, targets: set[str]) -> set[str]:
    """Returns the targets of `layers_to_transform`; those without a number may be a stack."""
    if config.layers_to_transform is None:
        return targets
    indices = {name: config.layer_index(tuple(name.split("."))) for name in targets}
    missing = set(config.layers_to_transform) - set(indices.values())
    if missing and None not in indices.values():
        raise ConfigError(
            f"layers_to_transform asks for {sorted(missing)}, but the layers selected have the "
            f"numbers {sorted({i for i in indices.values() if i is not None})}"
        )
    return {n for n, i in indices.items() if i is None or i in config.layers_to_transform}


def check_indices(config: DoRAConfig, adapted: Mapping[Path, AdapterSpec]) -> None:
    """Checks that `layers_to_transform` found every layer, now that stacks are known as such.

    Raises:
      ConfigError: there is no layer of some number, and no stack that it could be a place in.
    """
    if config.layers_to_transform is None or any(spec.indices for spec in adapted.values()):
        return
    if missing := set(config.layers_to_transform) - {config.layer_index(p) for p in adapted}:
        raise ConfigError(
            f"layers_to_transform asks for {sorted(missing)}, but no layer that target_modules "
            f"selects has such a number in its path (layers_pattern={config.layers_pattern!r}), "
            "nor is one a stack"
        )


def match_modules(patterns: Sequence[str], modules: Iterable[str], field: str) -> set[str]:
    """Returns the dotted names that equal a pattern or end in it; each pattern must match one."""
    return _match(tuple(patterns), modules, field, modules)


def _patterns(field: str, value: str | Iterable[str]) -> str | tuple[str, ...]:
    """Normalises a selection: a regular expression stays a string, names become a tuple."""
    if isinstance(value, str):
        if value != ALL_LINEAR:
            _check_regex(field, value)
        return value
    names = _entries(field, value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{field} must hold non-empty strings, got {name!r}")
    return tuple(name.replace("/", ".") for name in names)


def _entries(field: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"{field} must be a list, got {value!r}")
    return tuple(value)


def _pattern_dict(field: str, value: Any) -> dict[str, Any]:
    if not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise ConfigError(f"{field} must be a dict with patterns for keys, got {value!r}")
    return dict(value)


def _match(
    patterns: str | Sequence[str], names: Iterable[str], field: str, modules: Iterable[str]
) -> set[str]:
    names = set(names)
    if isinstance(patterns, str):
        found = {name for name in names if re.fullmatch(patterns, name)}
        if not found:
            raise ConfigError(
                f"{field}={patterns!r} fully matches no layer's dotted path. {_known(names)}"
            )
        return found
    found = set()
    for pattern in patterns:
        matched = {name for name in names if _ends_in(name, pattern)}
        if not matched and any(_ends_in(name, pattern) for name in modules):
            raise LayoutError(
                f"{field} names {pattern!r}, but that module is no layer whose kernel layout is "
                f"known. Name the layers inside it, or leave it out. {_known(names)}"
            )
        if not matched:
            near = _nearest(pattern, names)
            raise ConfigError(f"{field} entry {pattern!r} matches nothing. Nearest names: {near}")
        found |= matched
    return found


def _ends_in(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _pattern_matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for pattern, v in patterns.items() if _pattern_matches(pattern, name)), default)


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """Returns the three names most like `pattern`, compared with the last parts of each path."""
    tail = pattern.count(".") + 1
    tails = {name: ".".join(name.split(".")[-tail:]) for name in sorted(names)}
    near = difflib.get_close_matches(pattern, list(tails.values()), n=3, cutoff=0.0)
    return list(dict.fromkeys(next(n for n, t in tails.items() if t == match) for match in near))


def _known(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
    return f"Layers that can be adapted: {shown or 'none'}."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_positive(field: str, value: Any) -> None:
    if not (_is_number(value) and value > 0):
        raise ConfigError(f"{field} must be a finite number above 0, got {value!r}")


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_rank(field: str, rank: Any) -> None:
    if not _is_index(rank):
        raise ConfigError(f"{field} must be an integer of at least 0, got {rank!r}")


def _check_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}: {pattern!r} is no regular expression: {error}") from error


def _float_dtype_name(dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError as error:
        raise ConfigError(f"adapter_dtype is no dtype: {dtype!r}") from error
    if not jnp.issubdtype(jnp.dtype(name), jnp.floating):
        raise ConfigError(f"adapter_dtype must be a floating dtype, got {name}")
    return name

"""`DoRAConfig`, which layers are adapted and how, and the settings of one layer."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

from dora_jax.errors import ConfigError, Path
from dora_jax.validation import (
    ALL_LINEAR,
    answer_to,
    check_boolean,
    check_choice,
    check_positive,
    check_rank,
    check_regex,
    entries,
    float_dtype_name,
    is_integer,
    is_number,
    module_patterns,
    name_or_names,
    numbered_place,
    pattern_dict,
    pattern_matches,
    python_value,
    with_words_of_peft,
)

NormGradient = Literal["exact", "detached"]
Init = Literal["kaiming_uniform", "gaussian", "orthogonal", "pissa", "olora"]
# Of a layer's path, its kernel as float32 matrices `(*stack, in, out)`, its rank and a key, to
# `A (*stack, in, r)` and `B (*stack, r, out)`.
InitFunction = Callable[[Path, Any, int, Any], tuple[Any, Any]]
CUSTOM = "custom"  # stands in JSON for such a function

# Settings that change a layer's output; the rest affect training only.
OUTPUT_FIELDS = (
    *("rank", "scaling", "decompose", "normalize"),
    *("magnitude_trainable", "eps", "indices"),
)


@dataclasses.dataclass(frozen=True)
class LayerSettings:
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
    precomputed: bool = False
    indices: tuple[int, ...] | None = None

    def adapts(self, index: int, length: int) -> bool:
        """Whether `layers_to_transform` selects a layer of a stack of some length."""
        return self.indices is None or index in self.indices or index - length in self.indices

    @property
    def has_magnitude(self) -> bool:
        """Whether the layer trains a magnitude (`decompose` and `magnitude_trainable`)."""
        return self.decompose and self.magnitude_trainable

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The arrays of the layer's adapter, in order; `scale` where it was precomputed."""
        low_rank = ("lora_a", "lora_b") if self.rank else ()
        if self.precomputed and self.decompose:
            return (*low_rank, "scale")
        return low_rank + (("magnitude",) if self.has_magnitude else ())


@with_words_of_peft
@dataclasses.dataclass(frozen=True, eq=False)
class DoRAConfig:
    r"""Which layers are adapted, and how. Frozen, validated when made, round-trips through JSON.

    Numbers and lists may be NumPy's; they become Python's.

    Attributes:
      rank: rank r of the low-rank direction; 0 trains the magnitude alone.
      alpha: numerator of the scaling `s = alpha / rank`.
      dropout: rate applied to the input of the low-rank branch only, in [0, 1).
      target_modules: names or dotted path suffixes (`["query", "attention.value"]`), a regular
        expression that must match the whole dotted path (`r".*attention\.(query|value)"`), or
        `"all-linear"` (every dense kernel outside `modules_to_save`; not convolutions, embeddings),
        alone or in a list with names.
      exclude_modules: modules left alone, with all inside them, although targeted; same forms as
        `target_modules`.
      rank_pattern: rank by layer; a key matches a path as `(.*\.)?(KEY)$`, the first that does
        counts.
      alpha_pattern: alpha by layer; keys match as in `rank_pattern`.
      modules_to_save: modules trained in full, next to the adapters (a new head, norms), or
        parameters that stand next to modules (a class token); names or path suffixes. They live in
        the adapter tree and are trained by the same optimiser.
      use_rslora: scale by `alpha / sqrt(rank)` (arXiv 2312.03732) instead of `alpha / rank`.
      magnitude_trainable: False keeps the magnitude at `||W0||`.
      normalize: False keeps the denominator at `||W0||`.
      decompose: False is plain LoRA: no magnitude, no norm.
      norm_gradient: "exact" differentiates through the norm; "detached" holds it constant
        (DoRA, section 4.3; what PEFT does).
      layers_to_transform: indices of the layers adapted, out of those that `target_modules`
        selects; a layer's index is the first number in its path (`layers.3.mlp`, `block_3.mlp`),
        or the position in the outermost stack of scanned and vmapped layers. A negative one counts
        from the last layer, -1.
      layers_pattern: the name or names that the number follows (`"layers"`, `"decoder.layers"`), if
        it is not the first number.
      init: how the low-rank factors start. With `lora_b` at zero, `lora_a` is drawn as
        "kaiming_uniform", `U(-1/sqrt(in), 1/sqrt(in))`, "gaussian", `N(0, 1/rank^2)` (both as in
        PEFT), or "orthogonal" (orthonormal columns; rows where the rank is above the kernel's in
        side). "pissa" (arXiv 2404.02948) starts from the largest singular vectors of the kernel,
        "olora" (arXiv 2406.01775) from its QR decomposition, an `InitFunction` where it likes; in
        JSON that is "custom". There only the change of the product counts, so that the kernel stays
        the pretrained one, and the start is an identity to rounding.
      eps: smallest norm that a column is divided by.
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
      dora_jax.errors.ConfigError: dropout must be in [0, 1), got 1.0
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
    layers_pattern: str | Sequence[str] | None = None
    use_rslora: bool = False
    magnitude_trainable: bool = True
    normalize: bool = True
    decompose: bool = True
    norm_gradient: NormGradient = "exact"
    init: Init | InitFunction = "kaiming_uniform"
    eps: float = 1e-8
    adapter_dtype: str = "float32"

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        for own in dataclasses.fields(self):
            put(own.name, python_value(own.name, getattr(self, own.name)))
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save must be a list of names: [{self.modules_to_save!r}]"
            )
        for field in ("target_modules", "exclude_modules", "modules_to_save"):
            put(field, module_patterns(field, getattr(self, field)))
        for field in ("rank_pattern", "alpha_pattern"):
            put(field, pattern_dict(field, getattr(self, field)))
        put("adapter_dtype", float_dtype_name(self.adapter_dtype))
        if self.layers_to_transform is not None:
            put("layers_to_transform", entries("layers_to_transform", self.layers_to_transform))
        put("layers_pattern", name_or_names("layers_pattern", self.layers_pattern))
        self._validate()
        for field in ("alpha", "dropout", "eps"):
            put(field, float(getattr(self, field)))
        put("alpha_pattern", {key: float(alpha) for key, alpha in self.alpha_pattern.items()})

    def __eq__(self, other: object) -> bool:
        # Compare JSON: pattern dicts are ordered, since the first match wins.
        if not isinstance(other, DoRAConfig):
            return False
        return self.init == other.init and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def _validate(self) -> None:
        check_rank("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_positive("eps", self.eps)
        if not (is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")
        for pattern, rank in self.rank_pattern.items():
            check_regex("rank_pattern", pattern)
            check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            check_regex("alpha_pattern", pattern)
            check_positive(f"alpha_pattern[{pattern!r}]", alpha)
        check_choice("norm_gradient", self.norm_gradient, get_args(NormGradient))
        if self.init_name != CUSTOM:
            check_choice("init", self.init, get_args(Init))
        for field in ("use_rslora", "magnitude_trainable", "normalize", "decompose"):
            check_boolean(field, getattr(self, field))
        indices = self.layers_to_transform
        if indices is not None and (not indices or not all(is_integer(i) for i in indices)):
            raise ConfigError(f"layers_to_transform must hold integers, got {list(indices)}")
        if self.layers_pattern is not None and indices is None:
            raise ConfigError("layers_pattern needs layers_to_transform")
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
        fields = dataclasses.asdict(dataclasses.replace(self, init=cast("Any", self.init_name)))
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def to_json(self) -> str:
        """Returns the configuration as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @property
    def init_name(self) -> str:
        """The name of `init` in JSON."""
        return CUSTOM if callable(self.init) else self.init

    @property
    def changes_product(self) -> bool:
        """Whether `lora_a lora_b` does not start at zero, so that its change is what counts."""
        return self.init_name in ("pissa", "olora", CUSTOM)

    @classmethod
    def from_json(cls, text: str) -> DoRAConfig:
        """Reads what `to_json` wrote; unknown fields raise `ConfigError`."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the DoRA configuration is not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"a DoRA configuration is a JSON object, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            answer = answer_to(unknown) or f"the known ones are {sorted(known)}"
            raise ConfigError(f"unknown fields {unknown}; {answer}")
        return cls(**fields)

    def layer_settings(self, path: Path) -> LayerSettings:
        """Returns the settings of the layer at `path`, patterns applied."""
        name = ".".join(path)
        rank = _first_match(self.rank_pattern, name, self.rank)
        alpha = _first_match(self.alpha_pattern, name, self.alpha)
        divisor = math.sqrt(rank) if self.use_rslora else rank
        return LayerSettings(
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
            if self.layers_to_transform is not None and self.layer_place(path) is None
            else None,
        )

    def layer_place(self, path: Path) -> tuple[Path, int] | None:
        """Returns which numbered layers a path is in, and its number; None if it has none.

        Example:
          >>> DoRAConfig().layer_place(("layers", "3", "mlp")), DoRAConfig().layer_place(("h_3",))
          ((('layers',), 3), (('h',), 3))
        """
        names = self.layers_pattern
        return numbered_place(path, (names,) if isinstance(names, str) else names)


class TrainedConfig(DoRAConfig):
    """The configuration of a trained adapter, equal to a `DoRAConfig`: nothing warns of it."""

    @classmethod
    def of(cls, config: DoRAConfig) -> TrainedConfig:
        """Returns a configuration as that of a trained adapter."""
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})


def _first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for pattern, v in patterns.items() if pattern_matches(pattern, name)), default)

"""Which layers of a model a `DoRAConfig` selects."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from dora_jax.config import DoRAConfig, LayerSettings, pattern_matches
from dora_jax.errors import ConfigError, LayoutError, Path
from dora_jax.patterns import compiled
from dora_jax.validation import ALL_LINEAR


def select_layers(
    config: DoRAConfig,
    layers: Mapping[Path, bool],
    modules: Iterable[Path],
    unsupported: Mapping[Path, tuple[str, bool]] | None = None,
) -> dict[Path, LayerSettings]:
    """Resolves which layers are adapted.

    Args:
      config: the configuration.
      layers: every layer that can be adapted, by path; True if `"all-linear"` covers it.
      modules: every module path of the model, adaptable or not (to explain a failure).
      unsupported: layers that hold a kernel and cannot be adapted: why, and whether
        `"all-linear"` would cover them.

    Returns:
      The settings of each selected layer, by path.

    Raises:
      LayoutError: an unsupported layer is selected, or a name matches only modules without a
        kernel.
      ConfigError: a pattern matches nothing (with the nearest names), or no layer is left.

    Example:
      >>> layers = {("mlp", "up"): True, ("mlp", "down"): True}
      >>> list(select_layers(DoRAConfig(target_modules=["up"]), layers, layers))
      [('mlp', 'up')]
    """
    all_names = {".".join(path) for path in modules}
    names = {".".join(path): path for path in layers}
    reasons = {".".join(path): why for path, why in (unsupported or {}).items()}
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
            if targets and not any(pattern_matches(pattern, name) for name in targets):
                raise ConfigError(
                    f"{field} key {pattern!r} matches no adapted layer. {_known(targets)}"
                )
    return {names[n]: config.layer_settings(names[n]) for n in names if n in targets}


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


def check_indices(config: DoRAConfig, adapted: Mapping[Path, LayerSettings]) -> None:
    """Checks that `layers_to_transform` found every layer, now that stacks are known as such.

    Raises:
      ConfigError: there is no layer of some number, and no stack that it could be a place in.
    """
    if config.layers_to_transform is None or any(settings.indices for settings in adapted.values()):
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


def _match(
    patterns: str | Sequence[str], names: Iterable[str], field: str, modules: Iterable[str]
) -> set[str]:
    names = set(names)
    if isinstance(patterns, str):
        regex = compiled(patterns, field)
        found = {name for name in names if regex.fullmatch(name)}
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


def saved_paths(config: DoRAConfig, modules: Iterable[Path]) -> list[Path]:
    """Returns the paths of the modules that `modules_to_save` selects, in order."""
    by_name = {".".join(path): path for path in modules}
    saved = match_modules(config.modules_to_save, by_name, "modules_to_save")
    return [by_name[name] for name in sorted(saved)]

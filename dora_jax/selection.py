"""Which layers of a model a `DoRAConfig` selects."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence

from dora_jax.config import DoRAConfig, LayerSettings
from dora_jax.errors import ConfigError, LayoutError, Path
from dora_jax.patterns import compiled
from dora_jax.validation import ALL_LINEAR, ends_in, pattern_matches


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
    modules = list(modules)
    all_names = {".".join(path) for path in modules}
    names = {".".join(path): path for path in layers}
    reasons = {".".join(path): why for path, why in (unsupported or {}).items()}
    saved = match_modules(config.modules_to_save, all_names, "modules_to_save")
    excluded = _match(config.exclude_modules, all_names, "exclude_modules", all_names)
    chosen, all_linear = all_linear_apart(config.target_modules)
    targets = _match(chosen, {*names, *reasons}, "target_modules", all_names)
    if all_linear:
        targets |= {n for n, path in names.items() if layers[path]}
        targets |= {n for n, (_, covered) in reasons.items() if covered}
    targets = {t for t in targets if not any(_is_inside(t, e) for e in saved | excluded)}
    targets = _with_indices(config, targets, modules)
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
        _check_shadowed(field, getattr(config, field), targets)
    return {names[n]: config.layer_settings(names[n]) for n in names if n in targets}


def _check_shadowed(field: str, patterns: Mapping[str, float], names: Iterable[str]) -> None:
    """Raises `ConfigError` for a key whose layers all have another value, from earlier keys."""
    first = {n: next((p for p in patterns if pattern_matches(p, n)), None) for n in names}
    for pattern, value in patterns.items():
        earlier = {first[name] for name in first if pattern_matches(pattern, name)}
        if pattern not in earlier and any(patterns[p] != value for p in earlier if p is not None):
            raise ConfigError(
                f"{field} key {pattern!r} has no effect: {sorted(map(repr, earlier))[0]} comes "
                f"before it, and the first key that matches counts. Put {pattern!r} first, or "
                "leave it out"
            )


def all_linear_apart(
    targets: str | Sequence[str],
) -> tuple[str | tuple[str, ...], bool]:
    """Returns the targets without "all-linear", and whether it was among them."""
    if targets == ALL_LINEAR:
        return (), True
    if isinstance(targets, str):
        return targets, False
    return tuple(target for target in targets if target != ALL_LINEAR), ALL_LINEAR in targets


def _with_indices(config: DoRAConfig, targets: set[str], modules: Iterable[Path]) -> set[str]:
    """Returns the targets of `layers_to_transform`; those without a number may be a stack."""
    if config.layers_to_transform is None:
        return targets
    found = {".".join(p): i for p, i in _indices(config, _paths(targets), modules).items()}
    missing = set(config.layers_to_transform).difference(*found.values())
    if missing and targets == found.keys():
        places = [config.layer_place(path) for path in _paths(targets)]
        raise ConfigError(
            f"layers_to_transform asks for {sorted(missing)}, but the layers selected have the "
            f"numbers {sorted({place[1] for place in places if place})}"
        )
    return {name for name in targets if found.get(name, {None})}


def _paths(names: Iterable[str]) -> list[Path]:
    return [tuple(name.split(".")) for name in names]


def _indices(
    config: DoRAConfig, paths: Iterable[Path], modules: Iterable[Path]
) -> dict[Path, set[int]]:
    """Returns which of `layers_to_transform` each numbered layer is, counted from either end."""
    counts: dict[Path, int] = {}
    for place in map(config.layer_place, modules):
        if place:
            counts[place[0]] = max(counts.get(place[0], 0), place[1] + 1)
    places = {path: place for path in paths if (place := config.layer_place(path))}
    asked = set(config.layers_to_transform or ())
    return {path: asked & {i, i - counts[before]} for path, (before, i) in places.items()}


def check_indices(
    config: DoRAConfig, adapted: Mapping[Path, LayerSettings], modules: Iterable[Path]
) -> None:
    """Checks that `layers_to_transform` found every layer, now that stacks are known as such.

    Args:
      config: the configuration.
      adapted: the settings of the adapted layers.
      modules: every module of the model.

    Raises:
      ConfigError: there is no layer of some number, and no stack that it could be a place in.
    """
    if config.layers_to_transform is None or any(settings.indices for settings in adapted.values()):
        return
    found = _indices(config, adapted, modules).values()
    if missing := set(config.layers_to_transform).difference(*found):
        raise ConfigError(
            f"layers_to_transform asks for {sorted(missing)}, but no layer that target_modules "
            f"selects has such a number in its path (layers_pattern={config.layers_pattern!r}), "
            "nor is one a stack"
        )


def check_reached(
    config: DoRAConfig, reached: Iterable[Path], unreached: Mapping[Path, bool]
) -> None:
    """Checks that the traced call of a model reaches the modules that a configuration names.

    Args:
      config: the configuration.
      reached: every module that the call runs.
      unreached: other modules that hold parameters; True if `"all-linear"` would cover them.

    Raises:
      ConfigError: an entry of `target_modules` or `modules_to_save` names such a module alone.

    Warns:
      UserWarning: the targets cover such modules too, which get no adapter; names them.
    """
    known = [".".join(path) for path in reached]
    missed = {".".join(path): is_dense for path, is_dense in unreached.items()}
    advice = "inputs=ExampleCall(...) of a call that does, or leave it out"
    for field in ("target_modules", "modules_to_save"):
        patterns = getattr(config, field)
        for pattern in () if isinstance(patterns, str) else patterns:
            found = [name for name in missed if ends_in(name, pattern)]
            if found and not any(ends_in(name, pattern) for name in known):
                raise ConfigError(
                    f"{field} entry {pattern!r} names {', '.join(found)}, which the traced call "
                    f"does not reach: give {advice}"
                )
    names = sorted(name for name, dense in missed.items() if _targets(config, name, dense))
    if names:
        warnings.warn(
            f"the traced call does not reach {', '.join(names)}, so that what it computes there "
            f"gets no adapter: give {advice}",
            stacklevel=5,
        )


def _targets(config: DoRAConfig, name: str, is_dense: bool) -> bool:
    """Returns whether a configuration selects a module by its name, as far as that tells."""
    parts = name.split(".")
    inside = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    if _names_any(config.exclude_modules, inside) or _names_any(config.modules_to_save, inside):
        return False
    chosen, all_linear = all_linear_apart(config.target_modules)
    return (all_linear and is_dense) or _names_any(chosen, [name])


def _names_any(patterns: str | Sequence[str], names: Sequence[str]) -> bool:
    """Returns whether a regular expression, or one of several suffixes, matches a name."""
    for pattern in [patterns] if isinstance(patterns, str) else [(p,) for p in patterns]:
        try:
            return bool(_match(pattern, names, "", names))
        except ConfigError:
            continue
    return False


def match_modules(patterns: str | Sequence[str], modules: Iterable[str], field: str) -> set[str]:
    """Returns the dotted names that equal a pattern or end in it; each pattern must match one.

    One string is a regular expression that matches the whole name.
    """
    modules = set(modules)
    patterns = patterns if isinstance(patterns, str) else tuple(patterns)
    return _match(patterns, modules, field, modules)


def _match(
    patterns: str | Sequence[str], names: Iterable[str], field: str, modules: Iterable[str]
) -> set[str]:
    names = set(names)
    if isinstance(patterns, str):
        whole = compiled(patterns, field)
        found = {name for name in names if whole.fullmatch(name)}
        if not found:
            raise ConfigError(
                f"{field}={patterns!r} fully matches no layer's dotted path. {_known(names)}"
            )
        return found
    found = set()
    for pattern in patterns:
        matched = {name for name in names if ends_in(name, pattern)}
        if not matched and any(ends_in(name, pattern) for name in modules):
            raise LayoutError(
                f"{field} names {pattern!r}, but that module is no layer whose kernel layout is "
                f"known. Name the layers inside it, or leave it out. {_known(names)}"
            )
        if not matched:
            near = _nearest(pattern, names)
            raise ConfigError(f"{field} entry {pattern!r} matches nothing. Nearest names: {near}")
        found |= matched
    return found


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


def is_in_saved_module(config: DoRAConfig, path: Path) -> bool:
    """Returns whether the module or array at `path` is in a module of `modules_to_save`."""
    names = [".".join(path[:n]) for n in range(1, len(path) + 1)]
    return any(ends_in(name, pattern) for pattern in config.modules_to_save for name in names)

"""Mistakes in a configuration, or between it and a model."""

from __future__ import annotations

from dora_jax import DoRAConfig
from dora_jax.errors import ConfigError, LayoutError
from tests.support.bad_inputs.models import (
    CONFIG,
    BadInput,
    LinenStack,
    adapt,
    adapt_linen,
)

CONFIGURATION = [
    BadInput("a negative rank", lambda: DoRAConfig(rank=-1), ConfigError, r"^rank must .* least 0"),
    BadInput("half a rank", lambda: DoRAConfig(rank=2.5), ConfigError, "^rank must be an integer"),  # type: ignore[arg-type]
    BadInput("alpha 0", lambda: DoRAConfig(alpha=0), ConfigError, "^alpha must .* above 0, got 0"),
    BadInput(
        "alpha not a number",
        lambda: DoRAConfig(alpha=float("nan")),
        ConfigError,
        "^alpha must be a finite number above 0, got nan",
    ),
    BadInput(
        "a dropout that drops everything",
        lambda: DoRAConfig(dropout=1.0),
        ConfigError,
        r"^dropout must be in \[0, 1\), got 1.0",
    ),
    BadInput("eps 0", lambda: DoRAConfig(eps=0.0), ConfigError, "^eps must be .* above 0, got 0.0"),
    BadInput(
        "no target",
        lambda: DoRAConfig(target_modules=[]),
        ConfigError,
        "^target_modules is empty: name layers, or use 'all-linear'",
    ),
    BadInput(
        "None for the targets",
        lambda: DoRAConfig(target_modules=None),  # type: ignore[arg-type]
        ConfigError,
        "^target_modules must be a list, got None",
    ),
    BadInput(
        "a target that is no regular expression",
        lambda: DoRAConfig(target_modules="layers.(up"),
        ConfigError,
        r"^target_modules: 'layers.\(up' is not a regular expression",
    ),
    BadInput(
        "a negative rank for one layer",
        lambda: DoRAConfig(rank_pattern={"up": -1}),
        ConfigError,
        r"^rank_pattern\['up'\] must be an integer of at least 0",
    ),
    BadInput(
        "a list of pairs for the ranks",
        lambda: DoRAConfig(rank_pattern=[("up", 1)]),  # type: ignore[arg-type]
        ConfigError,
        "^rank_pattern must be a dict with patterns for keys",
    ),
    BadInput(
        "an unknown gradient of the norm",
        lambda: DoRAConfig(norm_gradient="none"),  # type: ignore[arg-type]
        ConfigError,
        r"^norm_gradient must be one of \('exact', 'detached'\), got 'none'",
    ),
    BadInput(
        "an unknown start",
        lambda: DoRAConfig(init="eva"),  # type: ignore[arg-type]
        ConfigError,
        r"^init must be one of \(.*'pissa', 'olora'\), got 'eva'",
    ),
    BadInput(
        "adapters of integers",
        lambda: DoRAConfig(adapter_dtype="int8"),
        ConfigError,
        "^adapter_dtype must be a floating dtype, got int8",
    ),
    BadInput(
        "a word for a switch",
        lambda: DoRAConfig(decompose="yes"),  # type: ignore[arg-type]
        ConfigError,
        "^decompose must be True or False, got 'yes'",
    ),
    BadInput(
        "rank 0 without a magnitude",
        lambda: DoRAConfig(rank=0, magnitude_trainable=False),
        ConfigError,
        "^rank 0 trains the magnitude alone, so it needs .*magnitude_trainable=True",
    ),
    BadInput(
        "one name for the modules to save",
        lambda: DoRAConfig(modules_to_save="head"),
        ConfigError,
        r"^modules_to_save must be a list of names: \['head'\]",
    ),
    BadInput(
        "one number for the layers",
        lambda: DoRAConfig(layers_to_transform=3),  # type: ignore[arg-type]
        ConfigError,
        "^layers_to_transform must be a list, got 3",
    ),
    BadInput(
        "half a layer",
        lambda: DoRAConfig(layers_to_transform=[0.5]),  # type: ignore[list-item]
        ConfigError,
        r"^layers_to_transform must hold integers, got \[0.5\]",
    ),
    BadInput(
        "a pattern for numbers, without numbers",
        lambda: DoRAConfig(layers_pattern="layers"),
        ConfigError,
        "^layers_pattern needs layers_to_transform",
    ),
    BadInput(
        "a number for the name that numbers follow",
        lambda: DoRAConfig(layers_to_transform=[0], layers_pattern=[3]),  # type: ignore[list-item]
        ConfigError,
        r"^layers_pattern must be a name such as 'layers', or several, got \[3\]",
    ),
    BadInput(
        "a word of PEFT's",
        lambda: DoRAConfig(r=8),  # type: ignore[call-arg]
        ConfigError,
        "^these are words of PEFT's. Write rank for r",
    ),
    BadInput(
        "JSON with a field of PEFT's",
        lambda: DoRAConfig.from_json('{"r": 8}'),
        ConfigError,
        r"^unknown fields \['r'\]; these are words of PEFT's. Write rank for r",
    ),
    BadInput(
        "JSON cut short",
        lambda: DoRAConfig.from_json(CONFIG.to_json()[:40]),
        ConfigError,
        "^the DoRA configuration is not valid JSON",
    ),
]

SELECTION = [
    BadInput(
        "a misspelt target (NNX)",
        lambda: adapt(target_modules=["upp"]),
        ConfigError,
        r"^target_modules entry 'upp' matches nothing. Nearest names: \['layers.0.up'",
    ),
    BadInput(
        "a misspelt target (Linen)",
        lambda: adapt_linen(target_modules=["upp"]),
        ConfigError,
        r"^target_modules entry 'upp' matches nothing. Nearest names: \['layers_0.up'",
    ),
    BadInput(
        "a regular expression for the end of a path",
        lambda: adapt(target_modules="up"),
        ConfigError,
        "^target_modules='up' fully matches no layer's dotted path. .*: head, layers.0.up",
    ),
    BadInput(
        "a norm for a target",
        lambda: adapt_linen(target_modules=["norm"]),
        LayoutError,
        "^target_modules names 'norm', but that module is no layer .* Name the layers inside it",
    ),
    BadInput(
        "every target excluded",
        lambda: adapt(exclude_modules=["up", "head"]),
        ConfigError,
        "^no layer matched target_modules='all-linear'.*: head, layers.0.up, layers.1.up",
    ),
    BadInput(
        "a misspelt exclusion",
        lambda: adapt(exclude_modules=["haed"]),
        ConfigError,
        r"^exclude_modules entry 'haed' matches nothing. Nearest names: \['head'",
    ),
    BadInput(
        "a misspelt module to save",
        lambda: adapt_linen(modules_to_save=["haed"]),
        ConfigError,
        r"^modules_to_save entry 'haed' matches nothing. Nearest names: \['head'",
    ),
    BadInput(
        "a rank for a layer that is not adapted",
        lambda: adapt(target_modules=["up"], rank_pattern={"head": 1}),
        ConfigError,
        "^rank_pattern key 'head' matches no adapted layer. .*: layers.0.up",
    ),
    BadInput(
        "a rank after a pattern that matches all its layers",
        lambda: adapt(target_modules=["up"], rank_pattern={"up": 1, "layers.*": 2}),
        ConfigError,
        r"^rank_pattern key 'layers\.\*' has no effect: 'up' comes before it",
    ),
    BadInput(
        "the number of no layer",
        lambda: adapt(layers_to_transform=[0, 2]),
        ConfigError,
        r"^layers_to_transform asks for \[2\], but no layer that target_modules selects has",
    ),
    BadInput(
        "a number behind the name of no module",
        lambda: adapt_linen(layers_to_transform=[0], layers_pattern="blocks"),
        ConfigError,
        r"^layers_to_transform asks for \[0\].*\(layers_pattern='blocks'\)",
    ),
    BadInput(
        "a number for a layer that has none",
        lambda: adapt(target_modules=["head"], layers_to_transform=[0]),
        ConfigError,
        r"^layers_to_transform asks for \[0\], but no layer .* nor is one a stack",
    ),
    BadInput(
        "a number from the end that no layer has",
        lambda: adapt(layers_to_transform=[-3]),
        ConfigError,
        r"^layers_to_transform asks for \[-3\], but no layer that target_modules selects has",
    ),
    BadInput(
        "a start of which a file has the name alone",
        lambda: adapt(init="custom"),
        ConfigError,
        r"^init is 'custom', a function that no file holds: .*replace\(config, init=function\)",
    ),
    BadInput(
        "a start of wrong shapes",
        lambda: adapt(init=lambda path, kernel, rank, key: (kernel, kernel)),
        ConfigError,
        r"^head: init returned arrays of shapes .*, where A and B have ",
    ),
    BadInput(
        "a place before the start of a stack",
        lambda: adapt_linen(LinenStack(), layers_to_transform=[-5]),
        ConfigError,
        r"^blocks.up: layers_to_transform asks for \[-5\], but the stack has 4 layers",
    ),
    BadInput(
        "a place behind the end of a stack",
        lambda: adapt_linen(LinenStack(), layers_to_transform=[4]),
        ConfigError,
        r"^blocks.up: layers_to_transform asks for \[4\], but the stack has 4 layers",
    ),
]

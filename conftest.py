"""What every test, docstring example and notebook of a session shares.

- Compiled programs are kept in `.pytest_cache/jax`, for the other worker and for further runs: most
  of the time of a test is compilation. A program is found by its text, the versions and the flags,
  so that a change compiles anew.
- Random numbers come from the generator `rbg`, whose programs compile five to ten times faster on a
  CPU than those of the default, `threefry2x32`. No law depends on which numbers are drawn;
  `make test-full` draws them with the default.
- XLA compiles quickly rather than well, in half the time of a whole run. `make test-full` compiles
  as users do. The start of a large model is equal in every bit only there: compiled quickly, the
  plain and the adapted model may round a sum in two ways.
- Python collects garbage less often: tracing makes many objects that live long, and each full
  collection visits all of them. Programs carry no line of Python for each operation.
- The package is imported before pytest imports its files one by one for the examples in them. Under
  import-mode importlib, a file whose package is not yet imported is executed twice: once by the
  package, once by pytest. Classes of the two do not equal each other.
"""

import gc
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any


def processor() -> str:
    """Returns a name for what programs are compiled for: one folder may serve several machines."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().partition("flags")[2].partition("\n")[0] if cpuinfo.exists() else ""
    name = f"{platform.machine()} {platform.processor()} {flags}"
    return hashlib.sha256(name.encode()).hexdigest()[:12]


SETTINGS = {
    "jax_compilation_cache_dir": str(Path(__file__).parent / ".pytest_cache" / "jax" / processor()),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_default_prng_impl": "rbg",
    "jax_traceback_in_locations_limit": 0,
    "jax_disable_most_optimizations": True,
}
gc.set_threshold(50_000, 20, 100)


def setting(name: str) -> Any:
    """Returns a setting: from the environment, if it is there."""
    value, kind = os.environ[name.upper()], type(SETTINGS[name])
    return value.lower() in ("1", "true") if kind is bool else kind(value)


# By the environment, for subprocesses and notebooks.
for name, value in SETTINGS.items():
    os.environ.setdefault(name.upper(), str(value))

# Newer releases have one code generator for CPUs, so that there is nothing to choose.
CHOOSES_EMITTERS = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
if setting("jax_disable_most_optimizations") and CHOOSES_EMITTERS:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()

import jax  # noqa: E402

import dora_jax  # noqa: E402, F401

for name in SETTINGS:  # a plugin of pytest may have imported JAX before
    jax.config.update(name, setting(name))

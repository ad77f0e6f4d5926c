"""The options that every experiment has."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from experiments import decomposition, quickstart
from experiments.models.llama import Llama
from experiments.trainer.command_line import settings
from experiments.trainer.compile_cache import use_compile_cache
from experiments.trainer.settings import SettingsError, TrainerSettings


@pytest.mark.parametrize("module", [quickstart, decomposition])
def test_an_experiment_has_the_options_of_the_trainer(module, capsys):
    given = ["--mesh", "fsdp=8", "--microbatches", "4", "--dtype", "bfloat16", "--remat", "dots"]
    given += ["--profile", "trace", "--compile-cache", "off"]
    config = settings(module.Config, None, given).trainer
    assert (config.mesh, config.microbatches, config.dtype) == ("fsdp=8", 4, "bfloat16")
    assert (config.remat, str(config.profile), config.compile_cache) == ("dots", "trace", "off")
    with pytest.raises(SystemExit):
        settings(module.Config, module.__doc__, ["--help"])
    printed = capsys.readouterr().out
    assert "Examples:" in printed and f"python -m {module.__name__} --" in printed


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--mesh", "rows=2"], "cannot read"), (["--microbatches", "0"], "at least 1")],
)
def test_settings_that_are_refused_are_named(given, message, capsys):
    with pytest.raises(SystemExit):
        settings(quickstart.Config, None, given)
    assert message in capsys.readouterr().err


def test_a_model_gets_the_options_that_it_has_and_no_other_is_swallowed():
    def make(seed, *, dtype=jnp.float32):
        pass

    assert TrainerSettings().switches(make) == {}
    assert TrainerSettings(dtype="bfloat16").switches(make) == {"dtype": jnp.bfloat16}
    assert TrainerSettings(remat="full").switches(Llama) == {"remat": True}
    with pytest.raises(SettingsError, match="--remat: the model of this experiment has no such"):
        TrainerSettings(remat="full").switches(make)


def test_compiled_programs_are_kept_where_the_user_says(tmp_path):
    names = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
    before = {name: getattr(jax.config, name) for name in names}
    try:
        use_compile_cache(None)  # there is a folder, that of the tests
        assert jax.config.jax_compilation_cache_dir == before[names[0]]
        use_compile_cache(tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        use_compile_cache("off")
        assert not jax.config.jax_enable_compilation_cache
    finally:
        for name, value in before.items():
            jax.config.update(name, value)

"""Checkpoints and data that several tests of the experiments use."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from tokenizers import Tokenizer

from experiments.models.smollm import smollm2_folder
from experiments.tasks.download import DownloadError, minilm_folder, sarcasm_file
from tests.support.tiny_bert import write_tiny_bert


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """The models are tiny: compiling them well takes longer than running them as they are."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def sarcasm() -> Path:
    return _downloaded(sarcasm_file)


@pytest.fixture(scope="session")
def tiny_checkpoint(sarcasm, tmp_path_factory) -> Path:
    """A random BERT of one layer, with a tokenizer for its 100 tokens."""
    folder = write_tiny_bert(tmp_path_factory.mktemp("checkpoint"))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() <= 100
    return folder


@pytest.fixture(scope="session")
def minilm(sarcasm) -> Path:
    """The pretrained MiniLM's folder; the texts are there too."""
    return _downloaded(minilm_folder)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The pretrained SmolLM2's folder."""
    pytest.importorskip("gguf")
    return _downloaded(smollm2_folder)


def _downloaded(download: Callable[[], Path]) -> Path:
    try:
        return download()
    except DownloadError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"needs a download: {error}")

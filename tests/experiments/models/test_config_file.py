"""A file that is no configuration is refused with its name."""

import pytest

from experiments.models.bert_config import BertConfig
from experiments.models.config_file import ModelConfigError
from experiments.models.llama_config import LlamaConfig

CONFIGS = pytest.mark.parametrize("config", [BertConfig, LlamaConfig])


@CONFIGS
def test_a_missing_file_is_named(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        config.from_json(tmp_path / "config.json")


@CONFIGS
@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[1, 2]", "one JSON object"), ("{}", "missing model_type")],
)
def test_a_file_without_a_configuration_is_named(config, tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelConfigError, match=message) as caught:
        config.from_json(path)
    assert str(path) in str(caught.value)

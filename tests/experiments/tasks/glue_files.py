"""Small files in the published formats of the nine GLUE tasks, and tiny encoders for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from experiments.tasks.glue.reading import Rows

FIXTURES = Path(__file__).parents[2] / "fixtures" / "bert"

# Task: the first line, then rows; a row's texts hold quotation marks and odd line ends on purpose.
_PAIR = 'He said "yes\tIt\u2028rains'
_PARSES = "\t".join(["( a )"] * 4)
FORMATS: dict[str, tuple[str, str, list[str]]] = {
    # key: (names of columns, a row, the published labels)
    "cola": ("", 'gj04\t{label}\t{mark}\tThe "boat sank.', ["1", "0"]),
    "sst2": ("sentence\tlabel", "it 's a \" charming film \t{label}", ["1", "0"]),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        f"{{label}}\t702876\t702977\t{_PAIR}",
        ["1", "0"],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        f"0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\t{_PAIR}\t{{label}}",
        ["5.000", "0.25"],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        f"133273\t213221\t213222\t{_PAIR}\t{{label}}",
        ["1", "0"],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        f"0\t31193\t31193n\tgovernment\t{_PARSES}\t{_PAIR}\tneutral\t{{label}}",
        ["contradiction", "entailment"],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        f"0\t{_PAIR}\t{{label}}",
        ["entailment", "not_entailment"],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        f"0\t{_PAIR}\t{{label}}",
        ["not_entailment", "entailment"],
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel", f"0\t{_PAIR}\t{{label}}", ["1", "0"]),
}
FOLDERS = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
}


def lines_of(key: str, rows: int) -> list[str]:
    """The lines of a file with so many rows, whose labels alternate."""
    names, row, labels = FORMATS[key]
    found = [row.format(label=labels[i % 2], mark="*" if i % 2 else "") for i in range(rows)]
    return [names, *found] if names else found


def write_glue(folder: Path, key: str, *, train: int = 4, validation: int = 5) -> Path:
    """Writes a task's files for training and validation, and returns their folder."""
    own = folder / FOLDERS[key]
    own.mkdir(parents=True)
    files = {"train": train, "dev": validation}
    if key == "mnli":
        files = {"train": train, "dev_matched": validation, "dev_mismatched": validation + 1}
    for name, rows in files.items():
        # CoLA's dev file has no newline at its end.
        end = "" if key == "cola" and name == "dev" else "\n"
        (own / f"{name}.tsv").write_text("\n".join(lines_of(key, rows)) + end, encoding="utf-8")
    return own


def write_encoder(folder: Path, kind: str) -> Path:
    """Writes a random BERT or RoBERTa of one layer, whose tokenizer knows the words w0 to w89."""
    folder.mkdir()
    config = json.loads((FIXTURES / f"{kind}_tiny" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(FIXTURES / f"{kind}_tiny" / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if ".layer.1." not in name}
    save_file(kept, folder / "model.safetensors")
    special = {"bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "roberta": ["<s>", "<pad>", "</s>"]}
    words = [*special[kind], *(f"w{i}" for i in range(90))]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "bert":
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def rows_of_words(count: int, *, seed: int = 0, words: int = 4, scores: bool = False) -> Rows:
    """Pairs of texts of up to so many words, labelled by whether their first words are in order."""
    rng = np.random.default_rng(seed)
    first, second = (
        [rng.integers(0, 90, rng.integers(1, words + 1)) for _ in range(count)] for _ in "ab"
    )
    ordered = np.array([a[0] < b[0] for a, b in zip(first, second, strict=True)])
    labels = rng.uniform(0, 5, count).astype(np.float32) if scores else ordered.astype(np.int32)
    texts = ([" ".join(f"w{i}" for i in text) for text in of] for of in (first, second))
    return Rows(*texts, labels)

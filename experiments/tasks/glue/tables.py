"""What the published files of the nine GLUE tasks hold: columns, labels and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from experiments.tasks.scores import accuracy, f1, matthews, pearson, spearman

Metric = Callable[[Any, Any], float]
"""`metric(predictions, labels)`, of arrays of one axis; higher is better."""

_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_NO_YES = ("0", "1")


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        key: Its name on the Hugging Face hub and on the command line.
        folder: The folder of its TSV files.
        texts: The columns of the text, or of the pair of texts.
        label: The column of the label.
        labels: The published labels, in the hub's numbering; none where the label is a score.
        metrics: The published metrics by name. The first one chooses the learning rate.
        hub_texts: The columns of the texts on the hub, if they are other than in the TSV files.
        header: The columns of a TSV file that has no line of names.
        development: The TSV file of the published validation rows, without `.tsv`.
        mismatched: The TSV file of validation rows of other genres, likewise.
        broken_rows: Rows that may have too few fields in the published TSV files. They are left out
            and counted.
        from_development: The published validation rows are all there is: training, validation and
            test rows are cut from them.
    """

    key: str
    folder: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: Mapping[str, Metric]
    hub_texts: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    development: str = "dev"
    mismatched: str | None = None
    broken_rows: int = 0
    from_development: bool = False

    @property
    def outputs(self) -> int:
        """Outputs of the head: one a class, and one for a score."""
        return len(self.labels) or 1

    @property
    def metric(self) -> str:
        """The metric that chooses; higher is better."""
        return next(iter(self.metrics))


_ACCURACY: dict[str, Metric] = {"accuracy": accuracy}
_ACCURACY_F1: dict[str, Metric] = {"accuracy": accuracy, "f1": f1}
_QNLI = GlueTask("qnli", "QNLI", ("question", "sentence"), "label", _ENTAILMENT, _ACCURACY)

TASKS = {
    task.key: task
    for task in (
        GlueTask(
            "cola",
            "CoLA",
            ("sentence",),
            "label",
            _NO_YES,
            {"matthews": matthews},
            header=("source", "label", "author's mark", "sentence"),
        ),
        GlueTask("sst2", "SST-2", ("sentence",), "label", _NO_YES, _ACCURACY),
        GlueTask(
            "mrpc",
            "MRPC",
            ("#1 String", "#2 String"),
            "Quality",
            _NO_YES,
            _ACCURACY_F1,
            hub_texts=_SENTENCES,
        ),
        GlueTask(
            "stsb", "STS-B", _SENTENCES, "score", (), {"pearson": pearson, "spearman": spearman}
        ),
        # Its published files have a few rows that end in the middle. Hugging Face's copy has left
        # them out as well: 363,846 rows to train on.
        GlueTask(
            "qqp",
            "QQP",
            ("question1", "question2"),
            "is_duplicate",
            _NO_YES,
            _ACCURACY_F1,
            broken_rows=50,
        ),
        GlueTask(
            "mnli",
            "MNLI",
            _SENTENCES,
            "gold_label",
            ("entailment", "neutral", "contradiction"),
            _ACCURACY,
            hub_texts=("premise", "hypothesis"),
            development="dev_matched",
            mismatched="dev_mismatched",
        ),
        _QNLI,
        dataclasses.replace(_QNLI, key="qnli-dev", from_development=True),
        GlueTask("rte", "RTE", _SENTENCES, "label", _ENTAILMENT, _ACCURACY),
        GlueTask("wnli", "WNLI", _SENTENCES, "label", _NO_YES, _ACCURACY),
    )
}
"""The tasks by key. `qnli-dev` is no published task: QNLI's validation rows alone, cut in three."""

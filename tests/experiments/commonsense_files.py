"""Small files of commonsense tasks in the published format."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.tasks.commonsense import TASKS

_ASKS = {
    "boolq": "Please answer the following question with true or false, question: ",
    "piqa": "Please choose the correct solution to the question: ",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given "
    "sentence: ",
    "hellaswag": "Please choose the correct ending to complete the given sentence: ",
}


def row(task: str, question: str, options: tuple[str, ...], label: int) -> dict[str, str]:
    """A row as it is published."""
    word = TASKS[task].word
    names = [f"{word}{i + 1}" if word else option for i, option in enumerate(options)]
    text = _ASKS.get(task, "Please choose the correct answer to the question: ") + question
    if word:
        named = zip(names, options, strict=True)
        between = "\n\n" if task == "piqa" else " "
        text += "\n\n" + between.join(f"{name.capitalize()}: {option}" for name, option in named)
    text += (" " if task == "winogrande" else "\n\n") + "Answer format: " + "/".join(names)
    answer = names[label]
    output = f"the correct answer is {answer}"
    return {"instruction": text, "input": "", "output": output, "answer": answer}


def write_task(data: Path, task: str, split: str, rows: list[dict[str, str]]) -> Path:
    """Writes the file of a split as it is published, and returns it."""
    folder = data / TASKS[task].folder
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.json"
    file.write_text(json.dumps(rows, indent=4))
    return file

"""Tasks: TRACE's folders or users' own from a YAML file, their metrics, and the tokens of their rows."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import regex
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hft_trl.errors import HFTError
from hft_trl.files import load_yaml, read_texts

TASKS_FILE = "tasks.yaml"
REPLAY_FOLDER = "Lima"  # general alignment data of a benchmark, TRACE's name for LIMA

# Order and epochs are those of TRACE's training script, which the HFT paper follows. Metrics are the HFT paper's:
# TRACE's code scores 20Minuten by SARI. ScienceQA's answers are a letter and the reasons: only the letter counts.
TRACE = {
    "C-STANCE": ("accuracy", 5),
    "FOMC": ("accuracy", 3),
    "MeetingBank": ("rouge_l", 7),
    "Py150": ("edit_similarity", 5),
    "ScienceQA": ("choice_accuracy", 3),
    "NumGLUE-cm": ("accuracy", 5),
    "NumGLUE-ds": ("accuracy", 5),
    "20Minuten": ("rouge_l", 7),
}
"""Metric and epochs of TRACE's eight tasks, in the paper's order."""


class Row(NamedTuple):
    """Store a prompt and the answer to write. The text is their concatenation."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Store a task: its rows to train on and to be scored on, its metric, and the epochs of its round."""

    name: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    metric: str  # a name of METRICS
    epochs: int


def read_benchmark(folder: str | Path) -> list[Task]:
    """Read TRACE's folder or one with a `tasks.yaml`, as tasks in the order in which they are learned."""
    folder = Path(folder)
    if not folder.is_dir():
        raise HFTError(f"benchmark {str(folder)!r} is no folder: give the path of TRACE's LLM-CL-Benchmark_5000.")
    if (folder / TASKS_FILE).is_file():
        return read_tasks(folder / TASKS_FILE)
    if missing := [name for name in TRACE if not (folder / name).is_dir()]:
        raise HFTError(
            f"benchmark {str(folder)!r} has no folder {missing[0]!r} ({len(missing)} of TRACE's {len(TRACE)} tasks "
            f"are missing): complete it, or list the tasks that exist in a {TASKS_FILE}."
        )
    return [_from_yaml({"name": name}, name, folder) for name in TRACE]


def read_tasks(path: str | Path) -> list[Task]:
    """Read users' own tasks: `name`, `files`, `metric` and `epochs` of each. TRACE's have defaults."""
    path = Path(path)
    content = load_yaml(path)
    if unknown := sorted(map(str, content.keys() - {"tasks"})):
        raise HFTError(f"{path} has the key {unknown[0]!r}: the only one is tasks.")
    entries = content.get("tasks")
    if not isinstance(entries, list) or not entries:
        raise HFTError(f"{path} has no list of tasks: write name, metric and epochs of each below tasks.")
    return [_from_yaml(entry, f"task {number} of {path}", path.parent) for number, entry in enumerate(entries, 1)]


def _from_yaml(entry: Any, where: str, folder: Path) -> Task:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise HFTError(f"{where} is {entry!r}: give it a name, metric and epochs.")
    name = entry["name"]
    if name != Path(name).name or name.startswith("."):
        raise HFTError(f"{where} has the name {name!r}: files are named after it, so use no slash and no leading dot.")
    where = f"{where} ({name})"
    if unknown := sorted(map(str, entry.keys() - {"name", "files", "metric", "epochs"})):
        raise HFTError(f"{where} has the key {unknown[0]!r}: the keys are name, files, metric and epochs.")
    metric, epochs = TRACE.get(name, ("", 0))
    metric, epochs, files = entry.get("metric", metric), entry.get("epochs", epochs), entry.get("files", name)
    if not isinstance(metric, str) or metric not in METRICS:
        raise HFTError(f"{where} has the metric {metric!r}: it must be one of {', '.join(METRICS)}.")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise HFTError(f"{where} has epochs {epochs!r}: it must be a whole number of at least 1.")
    if isinstance(files, str):
        files = {"train": f"{files}/train.json", "test": f"{files}/test.json"}
    if not isinstance(files, dict) or not all(isinstance(files.get(split), str) for split in ("train", "test")):
        raise HFTError(f"{where} has files {files!r}: give a folder, or a file each for train and test.")
    return Task(name, *(read_rows(folder / files[split]) for split in ("train", "test")), metric, epochs)


def read_rows(path: str | Path) -> tuple[Row, ...]:
    return tuple(Row(row["prompt"], row["answer"]) for row in read_texts(Path(path), "prompt", "answer"))


def read_replay(folder: str | Path) -> tuple[Row, ...]:
    """Read the general alignment data of a benchmark, `Lima/train.json`. Return no rows if it has none."""
    path = Path(folder) / REPLAY_FOLDER / "train.json"
    return read_rows(path) if path.exists() else ()


def encode(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None, num_proc: int | None = None
) -> tuple[Dataset, int]:
    """
    Encode rows as TRACE does: prompt, answer and end token, truncated from the left, unlike in TRL.

    Return `input_ids` and `labels` (-100 without a loss), and the number of truncated rows.
    """
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path
        raise HFTError(f"the tokenizer of {name!r} has no end-of-sequence token: set its eos_token, and save it.")

    def tokens(row: dict[str, str]) -> dict[str, list[int] | bool]:
        # Tokens begin with a space, so spaces at the end of a prompt belong to the answer
        prompt, whole = _without_end(tokenizer, [row["prompt"].rstrip(" "), row["prompt"] + row["answer"]])
        whole = [*whole, tokenizer.eos_token_id]
        # A token that spans prompt and answer belongs to the answer
        start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        labels = [-100] * start + whole[start:]
        kept = slice(0 if max_length is None else -max_length, None)
        return {"input_ids": whole[kept], "labels": labels[kept], "cut": len(whole[kept]) < len(whole)}

    # From the rows and not from a JSON file, whose reader would parse answers such as 2026-01-31 as dates
    dataset = Dataset.from_list([row._asdict() for row in rows])
    encoded = dataset.map(
        tokens, remove_columns=dataset.column_names, num_proc=num_proc, desc="Tokenizing prompts and answers"
    )
    return encoded.remove_columns("cut"), sum(encoded["cut"])


def encode_prompts(
    prompts: Iterable[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[list[list[int]], int]:
    """Encode prompts for generation. Return the token ids of each, and the number of truncated prompts."""
    rows = _without_end(tokenizer, [prompt.rstrip(" ") for prompt in prompts])
    if max_length is None:
        return rows, 0
    return [row[-max_length:] for row in rows], sum(len(row) > max_length for row in rows)


def _without_end(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts without the end-of-sequence token that some tokenizers append to each text."""
    rows = tokenizer(list(texts))["input_ids"]
    return [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in rows]


def accuracy(prediction: str, answer: str) -> float:
    """Compute whether the prediction equals the answer, except for surrounding white space."""
    return 100.0 * (prediction.strip() == answer.strip())


def choice_accuracy(prediction: str, answer: str) -> float:
    """Compute the accuracy of the first character, a choice's letter (TRACE's metric of ScienceQA)."""
    return accuracy(prediction.strip()[:1], answer.strip()[:1])


def edit_similarity(prediction: str, answer: str) -> float:
    """Compute rapidfuzz's `ratio`. Py150's placeholders of literals count as the literal."""
    from rapidfuzz.fuzz import ratio

    # Two empty texts are equal, which an answer such as <STR_LIT> can become
    return ratio(_literals(prediction).strip(), _literals(answer).strip()) if prediction.strip() else 0.0


def _literals(text: str) -> str:
    unnamed = {"NUM": "0", "STR": "", "CHAR": ""}
    return re.sub(r"<(NUM|STR|CHAR)_LIT(?::(.*?))?>", lambda found: found[2] or unnamed[found[1]], text, flags=re.S)


def rouge_l(prediction: str, answer: str) -> float:
    """Compute the F-measure of the longest common subsequence of words, with rouge-score."""
    return 100.0 * _scorer().score(answer, prediction)["rougeL"].fmeasure


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """Split a text of any alphabet into words. Each Chinese or Japanese character is a word."""

    # rouge-score's tokenizer keeps only a to z, and `\w` of `re` drops the vowel signs of Hindi
    UNPARTED = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
    WORD = regex.compile(rf"{UNPARTED}|(?:(?!{UNPARTED})(?:\p{{L}}\p{{M}}*|[\p{{N}}_]))+")

    def tokenize(self, text: str) -> list[str]:
        return self.WORD.findall(text.lower())


METRICS = {metric.__name__: metric for metric in (accuracy, choice_accuracy, edit_similarity, rouge_l)}
"""Metrics of a prediction and the answer, by the names that a tasks file uses."""


def mean_score(metric: str, predictions: Sequence[str], answers: Sequence[str]) -> float:
    return fmean(map(METRICS[metric], predictions, answers))


def constant_score(task: Task) -> float:
    """Compute the test score of always giving the most frequent answer of the training rows."""
    counted = slice(1) if task.metric == choice_accuracy.__name__ else slice(None)
    answer, _ = Counter(row.answer.strip()[counted] for row in task.train).most_common(1)[0]
    return mean_score(task.metric, [answer] * len(task.test), [row.answer for row in task.test])

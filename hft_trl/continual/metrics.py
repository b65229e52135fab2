"""Scores of one task from 0 to 100, by the libraries of the field; what can't be scored is 0."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import regex

from hft_trl.errors import HFTError

Metric = Callable[[Sequence[str], Sequence[str], Sequence[str]], float]
"""Prompts, predictions and answers, of one length, to a score from 0 to 100."""


def accuracy(prompts: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> float:  # noqa: ARG001
    """Share of the predictions that are the answer, white space around them aside."""
    pairs = zip(predictions, answers, strict=True)
    return _mean([100.0 * (prediction.strip() == answer.strip()) for prediction, answer in pairs])


def choice_accuracy(prompts: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Share of the predictions whose first character, the letter of a choice, is the answer's: TRACE's for ScienceQA."""
    return accuracy(prompts, *([text.strip()[:1] for text in texts] for texts in (predictions, answers)))


def edit_similarity(prompts: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> float:  # noqa: ARG001
    """
    Mean share of characters that need no insertion or deletion (rapidfuzz's `ratio`), white space around them aside.

    Placeholders of literals as Py150 has them (`<STR_LIT:text>`, `<NUM_LIT>`) count as the literal, as in TRACE's code. An
    empty prediction scores 0, also where the answer is a placeholder of an empty text.
    """
    from rapidfuzz.fuzz import ratio

    pairs = zip(predictions, answers, strict=True)
    return _mean([ratio(*(_literals(text).strip() for text in pair)) if pair[0].strip() else 0.0 for pair in pairs])


def _literals(text: str) -> str:
    unnamed = {"NUM": "0", "STR": "", "CHAR": ""}
    return re.sub(r"<(NUM|STR|CHAR)_LIT(?::(.*?))?>", lambda found: found[2] or unnamed[found[1]], text, flags=re.S)


def rouge_l(prompts: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> float:  # noqa: ARG001
    """Mean F-measure of the longest common subsequence of words (rouge-score, without stemming)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(predictions, answers, strict=True)
    return _mean([100.0 * scorer.score(answer, prediction)["rougeL"].fmeasure for prediction, answer in pairs])


class _Words:
    """
    Words of any alphabet, and each Chinese or Japanese character by itself, since no space parts the words there.

    rouge-score's own tokenizer drops every letter but a to z, so a German word falls apart. What `\\w` of Python's re leaves
    out is the marks that belong to a letter (Hindi's vowels), so a word of these would fall apart too.
    """

    UNPARTED = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
    WORD = regex.compile(rf"{UNPARTED}|(?:(?!{UNPARTED})(?:\p{{L}}\p{{M}}*|[\p{{N}}_]))+")

    def tokenize(self, text: str) -> list[str]:
        return self.WORD.findall(text.lower())


def sari(prompts: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> float:
    """
    SARI of text simplification (the `evaluate` library's, as in TRACE's code), with the prompt as the source.

    An empty prediction scores 0 here, where the formula would reward what it leaves out.
    """
    rows = [row for row in zip(prompts, predictions, answers, strict=True) if row[1].strip()]
    if not rows:
        return 0.0
    sources, written, wanted = zip(*rows, strict=True)
    found = _load_sari().compute(
        sources=list(sources), predictions=list(written), references=[[answer] for answer in wanted]
    )
    return float(found["sari"]) * len(rows) / len(prompts)


def _load_sari() -> "Callable":
    # A script's own folder comes first among Python's paths, and recipes/evaluate.py would be imported there.
    paths = sys.path
    sys.path = [path for path in paths if not (Path(path) / "evaluate.py").is_file()]
    try:
        import evaluate

        return evaluate.load("sari")
    except (ImportError, OSError, ConnectionError, ValueError) as error:
        raise HFTError(
            f"the metric sari can't be loaded ({' '.join(str(error).split()):.200}): run pip install evaluate sacrebleu "
            "sacremoses, and be online once, since its code is fetched from the hub; or score the task by rouge_l."
        ) from error
    finally:
        sys.path = paths


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "choice_accuracy": choice_accuracy,
    "edit_similarity": edit_similarity,
    "rouge_l": rouge_l,
    "sari": sari,
}
"""How a task can be scored, by the names that a tasks file uses."""


def check_metrics(names: Sequence[str]) -> None:
    """
    See that metrics can be computed, before anything is trained.

    Args:
        names (`Sequence[str]`):
            Names of [`METRICS`].

    Raises:
        [`HFTError`]: Naming what has to be installed.
    """
    for name in dict.fromkeys(names):
        try:
            METRICS[name](["a b"], ["a b"], ["a b"])
        except ImportError as error:
            raise HFTError(
                f"the metric {name} needs {error.name}: run pip install -c constraints.txt -e '.[continual]'."
            ) from error

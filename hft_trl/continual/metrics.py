"""Compute the metrics of tasks, from 0 to 100. An empty prediction scores 0."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import regex

from hft_trl.errors import HFTError

Metric = Callable[[Sequence[str], Sequence[str], Sequence[str]], float]
"""Takes prompts, predictions and answers, all of the same length, and returns a score from 0 to 100."""


def accuracy(_: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Compute the share of predictions that equal the answer, except for surrounding white space."""
    return _mean(lambda prediction, answer: 100.0 * (prediction.strip() == answer.strip()), predictions, answers)


def choice_accuracy(prompts: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Compute the accuracy of the first character, a choice's letter (TRACE's metric of ScienceQA)."""
    return accuracy(prompts, *([text.strip()[:1] for text in texts] for texts in (predictions, answers)))


def edit_similarity(_: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Compute the mean of rapidfuzz's `ratio`. Py150's placeholders of literals count as the literal."""
    from rapidfuzz.fuzz import ratio

    def score(prediction: str, answer: str) -> float:
        # Two empty texts are equal, which an answer such as <STR_LIT> can become
        return ratio(_literals(prediction).strip(), _literals(answer).strip()) if prediction.strip() else 0.0

    return _mean(score, predictions, answers)


def _literals(text: str) -> str:
    unnamed = {"NUM": "0", "STR": "", "CHAR": ""}
    return re.sub(r"<(NUM|STR|CHAR)_LIT(?::(.*?))?>", lambda found: found[2] or unnamed[found[1]], text, flags=re.S)


def rouge_l(_: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Compute the mean F-measure of the longest common subsequence of words, with rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return _mean(
        lambda prediction, answer: 100.0 * scorer.score(answer, prediction)["rougeL"].fmeasure, predictions, answers
    )


class _Words:
    """Split a text of any alphabet into words. Each Chinese or Japanese character is a word."""

    # rouge-score's tokenizer keeps only a to z, and `\w` of `re` drops the vowel signs of Hindi
    UNPARTED = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
    WORD = regex.compile(rf"{UNPARTED}|(?:(?!{UNPARTED})(?:\p{{L}}\p{{M}}*|[\p{{N}}_]))+")

    def tokenize(self, text: str) -> list[str]:
        return self.WORD.findall(text.lower())


def sari(prompts: Sequence[str], predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Compute SARI with the `evaluate` library, as TRACE does, with the prompt as the source."""
    # The formula would reward an empty prediction for what it leaves out
    rows = [row for row in zip(prompts, predictions, answers, strict=True) if row[1].strip()]
    if not rows:
        return 0.0
    sources, written, wanted = map(list, zip(*rows, strict=True))
    # Without the folder of the running script, where recipes/evaluate.py would be found first
    paths, sys.path = sys.path, [path for path in sys.path if not (Path(path) / "evaluate.py").is_file()]
    try:
        import evaluate

        metric = evaluate.load("sari")
    except (ImportError, OSError, ConnectionError, ValueError) as error:
        raise HFTError(
            f"the metric sari cannot be loaded ({' '.join(str(error).split()):.200}): run pip install evaluate "
            "sacrebleu sacremoses, and be online once to fetch its code from the hub, or score the task by rouge_l."
        ) from error
    finally:
        sys.path = paths
    found = metric.compute(sources=sources, predictions=written, references=[[answer] for answer in wanted])
    return float(found["sari"]) * len(rows) / len(prompts)


def _mean(score: Callable[[str, str], float], predictions: Sequence[str], answers: Sequence[str]) -> float:
    scores = [score(prediction, answer) for prediction, answer in zip(predictions, answers, strict=True)]
    return sum(scores) / len(scores)


METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (accuracy, choice_accuracy, edit_similarity, rouge_l, sari)
}
"""Metrics by the names that a tasks file uses."""


def check_metrics(names: Iterable[str]) -> None:
    """Check that the libraries of the named metrics are installed."""
    for name in dict.fromkeys(names):
        try:
            METRICS[name](["a b"], ["a b"], ["a b"])
        except ImportError as error:
            raise HFTError(
                f"the metric {name} needs {error.name}: run pip install -c constraints.txt -e '.[continual]'."
            ) from error

"""Compute the metrics of tasks, from 0 to 100. An empty prediction scores 0."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import regex

Metric = Callable[[str, str], float]
"""Takes a prediction and the answer."""


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


METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (accuracy, choice_accuracy, edit_similarity, rouge_l)
}
"""Metrics by the names that a tasks file uses."""


def mean_score(metric: str, predictions: Sequence[str], answers: Sequence[str]) -> float:
    return fmean(map(METRICS[metric], predictions, answers))

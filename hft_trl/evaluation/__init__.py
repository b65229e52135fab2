"""Evaluation with lm-evaluation-harness, which is imported only when a model is evaluated."""

from hft_trl.evaluation.scores import Evaluation, Score, print_evaluation, score_grids, write_evaluation
from hft_trl.evaluation.suites import SUITES, parse_suites

__all__ = ["SUITES", "Evaluation", "Score", "parse_suites", "print_evaluation", "score_grids", "write_evaluation"]

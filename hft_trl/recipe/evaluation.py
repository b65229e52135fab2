"""Evaluate the models of a recipe for its report."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft_trl import demo
from hft_trl.backends.zero import whole_models
from hft_trl.demo.probes import evaluate
from hft_trl.evaluation.run import evaluate_models, find_models
from hft_trl.evaluation.scores import AVERAGE
from hft_trl.evaluation.suites import headings
from hft_trl.recipe.arguments import ModelArguments

Figures = dict[str, dict[str, float | None]]


def evaluate_stages(
    start: ModelArguments, stages: dict[str, str], suites: Sequence[str] = ()
) -> tuple[Figures, Figures, dict[str, list[str]]]:
    """
    Return scores of the start model, `"base"`, and of stages, their errors, and headings by suite.

    Without suites, the embedded model is scored by its probes. All processes must call it.
    """
    base = start.model_name_or_path
    if not Path(base).is_dir() and start.model_revision != "main":
        base = f"{base}@{start.model_revision}"
    models = {"base": base, **stages}
    if not suites:
        if base != str(demo.MODEL) or not PartialState().is_main_process:
            return {}, {}, {}
        return {name: _probe(model) for name, model in models.items()}, {}, {}
    folders = find_models(models.values())
    folders = {name: folders[model] for name, model in models.items()}
    evaluation = evaluate_models(folders, suites, chat_template=start.chat_template)
    scores, errors, shown = {model: {} for model in models}, {model: {} for model in models}, {}
    for suite, found in evaluation.scores.items():
        skipped = [name for name in evaluation.skipped if name in headings(suite)]
        average = f"{suite} {AVERAGE}" + (f" without {', '.join(skipped)}" if skipped else "")
        shown[suite] = [*found["base"], average]
        for model in models:
            for heading, score in {**found[model], average: evaluation.average(suite, model)}.items():
                scores[model][heading], errors[model][heading] = score.value, score.stderr
    return scores, errors, shown


def _probe(model: str) -> dict[str, float]:
    with whole_models():  # only the main process runs this, so ZeRO-3 must not partition the model
        return evaluate(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model))

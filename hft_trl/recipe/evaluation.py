"""Evaluate the models of a recipe for its report."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft_trl import demo
from hft_trl.backends.zero import whole_models
from hft_trl.demo.probes import evaluate
from hft_trl.evaluation.run import evaluate_models, find_models
from hft_trl.evaluation.scores import AVERAGE, Score
from hft_trl.evaluation.suites import headings
from hft_trl.recipe.arguments import ModelArguments

Figures = dict[str, dict[str, float | None]]


def evaluate_stages(
    start: ModelArguments, stages: dict[str, str], suites: Sequence[str] = ()
) -> tuple[Figures, Figures, dict[str, list[str]]]:
    """
    Evaluate the models of a recipe, `"base"` first. All processes must call it.

    Args:
        start ([`~hft_trl.recipe.arguments.ModelArguments`]): The base, and the chat template for all models.
        stages (`dict[str, str]`): Folder of each stage's model by name.
        suites (`Sequence[str]`, *optional*): Suites to run. Without them, the embedded model is scored by its probes.

    Returns:
        `tuple[dict, dict, dict]`: Scores in percent and standard errors by model and heading, and headings by suite.
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
    # A report names skipped benchmarks in its headings
    skipped = {suite: [name for name in evaluation.skipped if name in headings(suite)] for suite in suites}
    without = {suite: f" without {', '.join(names)}" if names else "" for suite, names in skipped.items()}
    averages = {suite: f"{suite} {AVERAGE}{without[suite]}" for suite in suites}
    rows: dict[str, dict[str, Score]] = {model: {} for model in models}
    for model, row in rows.items():
        for suite, scores in evaluation.scores.items():
            row.update({**scores[model], averages[suite]: evaluation.average(suite, model)})
    return (
        {model: {heading: score.value for heading, score in row.items()} for model, row in rows.items()},
        {model: {heading: score.stderr for heading, score in row.items()} for model, row in rows.items()},
        {suite: [*scores["base"], averages[suite]] for suite, scores in evaluation.scores.items()},
    )


def _probe(model: str) -> dict[str, float]:
    with whole_models():  # only the main process runs this, so ZeRO-3 must not partition the model
        return evaluate(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model))

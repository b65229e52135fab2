"""The models of a recipe, evaluated for its report."""

from collections.abc import Sequence

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft_trl import demo
from hft_trl.demo.probes import evaluate
from hft_trl.evaluation.models import find_models
from hft_trl.evaluation.run import evaluate_models
from hft_trl.evaluation.scores import AVERAGE, Score
from hft_trl.zero import whole_models

Figures = dict[str, dict[str, float | None]]


def evaluate_stages(models: dict[str, str], suites: Sequence[str] = ()) -> tuple[Figures, Figures]:
    """
    Evaluate the models of a recipe. Every process has to call.

    Args:
        models (`dict[str, str]`):
            Folder or hub id of each model by name, the base first.
        suites (`Sequence[str]`, *optional*):
            Names of [`~hft_trl.evaluation.SUITES`]. Without any, the embedded world's probes are run where the base is
            the embedded model, in the first process and without the harness: they give what the suite `demo` gives.

    Returns:
        `tuple[dict, dict]`: Scores in percent, and their standard errors where they are known, by model and heading.

    Raises:
        [`HFTError`]: See [`~hft_trl.evaluation.run.evaluate_models`].
    """
    if not suites:
        if models["base"] != str(demo.MODEL) or not PartialState().is_main_process:
            return {}, {}
        return {name: _probe(model) for name, model in models.items()}, {}
    folders = find_models(models.values())
    evaluation = evaluate_models({name: folders[model] for name, model in models.items()}, suites)
    rows: dict[str, dict[str, Score]] = {}
    for model in models:
        rows[model] = {}
        for suite, scores in evaluation.scores.items():
            rows[model].update(scores[model])
            rows[model][f"{suite} {AVERAGE}"] = evaluation.average(suite, model)
    return (
        {model: {heading: score.value for heading, score in row.items()} for model, row in rows.items()},
        {model: {heading: score.stderr for heading, score in row.items()} for model, row in rows.items()},
    )


def _probe(model: str) -> dict[str, float]:
    with whole_models():  # under ZeRO-3 only the first process is here, and no part of a model would help it
        return evaluate(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model))

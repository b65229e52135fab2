"""Evaluate the models of a recipe for its report."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hft_trl import demo
from hft_trl.backends.zero import whole_models
from hft_trl.demo.probes import evaluate, probe_rows
from hft_trl.errors import HFTError, first_line
from hft_trl.evaluation.run import evaluate_models, find_models, sample_answers
from hft_trl.evaluation.scores import as_report
from hft_trl.recipe.arguments import ModelArguments

logger = logging.get_logger(__name__)

Figures = dict[str, dict[str, float | None]]
SAMPLES, LOOKED_AT, LONGEST = 2, 100, 400  # prompts, the rows that they are sought in, and their characters


def evaluate_stages(
    start: ModelArguments, stages: dict[str, str], suites: Sequence[str] = ()
) -> tuple[Figures, Figures, dict[str, list[str]]]:
    """
    Return scores of the start model, `"base"`, and of stages, their errors, and headings by suite.

    Without suites, the embedded model is scored by its probes. All processes must call it.
    """
    models = {"base": start.address, **stages}
    if not suites:
        if start.model_name_or_path != str(demo.MODEL) or not PartialState().is_main_process:
            return {}, {}, {}
        with whole_models():  # only the main process runs this, so ZeRO-3 must not partition the model
            probed = {
                name: evaluate(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model))
                for name, model in models.items()
            }
        return probed, {}, {}
    folders = find_models(models.values())
    folders = {name: folders[model] for name, model in models.items()}
    report = as_report(evaluate_models(folders, suites, chat_template=start.chat_template))
    return report.evaluation, report.standard_errors, report.suites


def sample_stages(
    start: ModelArguments, stages: Mapping[str, str], rows: Iterable[Mapping[str, Any]] | None
) -> list[dict[str, str]]:
    """
    Return the answers of the start model (`"base"`) and of `stages` to two prompts of `rows`.

    The embedded model is asked questions of its probes. Without prompts, or if a model cannot answer, the result is
    empty: a report is worth more than its samples.
    """
    if start.model_name_or_path == str(demo.MODEL):
        prompts = [probe_rows(kind)[0]["prompt"] for kind in ("questions", "instructions")]
    else:
        found = (_question(row) for row in islice(rows or [], LOOKED_AT))
        prompts = list(islice((prompt for prompt in found if prompt and len(prompt) <= LONGEST), SAMPLES))
    models, answers = {"base": start.address, **stages}, {}
    try:
        for name, model in models.items() if prompts else ():
            answers[name] = sample_answers(model, prompts, chat_template=start.chat_template)
    except (HFTError, RuntimeError) as error:  # such as memory that a trainer still holds
        logger.warning(f"Sample answers are left out of the report: {first_line(error)}")
        return []
    return [
        {"prompt": prompt, **{name: given[number] for name, given in answers.items()}}
        for number, prompt in enumerate(prompts)
    ]


def _question(row: Mapping[str, Any]) -> str | None:
    """Return the first user turn of a conversation, `None` for plain text."""
    turns = row.get("prompt") or row.get("messages") or row.get("chosen")
    return (
        next((turn["content"] for turn in turns if turn["role"] == "user"), None) if isinstance(turns, list) else None
    )

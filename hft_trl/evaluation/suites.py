"""The suites: which tasks of lm-evaluation-harness are asked, in which form, and which of their figures are shown."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hft_trl.errors import HFTError

TASKS = Path(__file__).parent / "tasks"
"""Folder of the tasks that the harness lacks in the needed form."""


@dataclass(frozen=True)
class Task:
    """
    A task or group of the harness.

    Args:
        name (`str`):
            Its name in the harness, or that of one of ours in [`TASKS`].
        figures (`dict[str, str]`):
            The figures to show, by heading, each as `"TASK METRIC,FILTER"`. The first one stands for the task in the
            suite's average.
        num_fewshot (`int`, *optional*):
            Number of examples in the prompt. By default the task's own.
        chat (`bool`, *optional*, defaults to `False`):
            Whether to ask with the model's chat template.
        runs_code (`bool`, *optional*, defaults to `False`):
            Whether grading runs what the model wrote.
    """

    name: str
    figures: dict[str, str]
    num_fewshot: int | None = None
    chat: bool = False
    runs_code: bool = False


SUITES: dict[str, tuple[Task, ...]] = {
    "general": (
        Task("mmlu", {"MMLU": "mmlu acc,none"}, num_fewshot=5, chat=True),
        Task("gsm8k_cot", {"GSM8K": "gsm8k_cot exact_match,flexible-extract"}, num_fewshot=8, chat=True),
        Task("bbh", {"BBH": "bbh exact_match,get-answer"}, num_fewshot=3, chat=True),
        Task("hft_tydiqa_goldp", {"TyDiQA": "hft_tydiqa_goldp f1,none"}, num_fewshot=1, chat=True),
        Task("truthfulqa_mc2", {"TruthfulQA": "truthfulqa_mc2 acc,none"}, chat=True),
        Task("hft_humaneval", {"HumanEval": "hft_humaneval pass@10,all"}, runs_code=True),
    ),
    "knowledge": (
        Task("nq_open", {"NaturalQuestions": "nq_open exact_match,remove_whitespace"}, num_fewshot=5),
        Task("triviaqa", {"TriviaQA": "triviaqa exact_match,remove_whitespace"}, num_fewshot=5),
        Task(
            "hft_hotpotqa_closed_book",
            {"HotpotQA": "hft_hotpotqa_closed_book exact_match,remove_whitespace"},
            num_fewshot=5,
        ),
    ),
    "demo": (
        Task("hft_demo_knowledge", {"knowledge": "hft_demo_knowledge acc,none"}),
        Task(
            "hft_demo_ability",
            {
                "ability": "hft_demo_ability right,none",
                "ability_questions": "hft_demo_questions right,none",
                "ability_instructions": "hft_demo_instructions right,none",
                "concise": "hft_demo_questions concise,none",
            },
            chat=True,
        ),
    ),
}


def parse_suites(names: str) -> list[str]:
    """
    Read a list of suites such as `"general,knowledge"`, and check that they can be run.

    Args:
        names (`str`):
            Names of [`SUITES`], comma-separated.

    Returns:
        `list[str]`: The names.

    Raises:
        [`HFTError`]: If there is no such suite, or if lm-evaluation-harness is not installed.
    """
    suites = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in suites if name not in SUITES]
    if unknown or not suites:
        raise HFTError(f"there is no suite {', '.join(unknown) or repr(names)}: choose from {', '.join(SUITES)}.")
    check_harness()
    return suites


def check_harness() -> None:
    """
    Check that lm-evaluation-harness is installed, without loading it.

    Raises:
        [`HFTError`]: If it is not.
    """
    if find_spec("lm_eval") is None:
        raise HFTError(
            "evaluation needs lm-evaluation-harness, which is not installed: pip install -c constraints.txt -e '.[eval]'."
        )


def headings(suite: str) -> list[str]:
    """The headings of all figures of a suite, whether it is run with code or without."""
    return [heading for task in SUITES[suite] for heading in task.figures]


def tasks_of(suites: Iterable[str], run_code: bool) -> dict[str, list[Task]]:
    """
    The tasks to run.

    Args:
        suites (`Iterable[str]`):
            Names of [`SUITES`].
        run_code (`bool`):
            Whether tasks may run the code that a model wrote.

    Returns:
        `dict[str, list[Task]]`: Tasks by suite.
    """
    return {suite: [task for task in SUITES[suite] if run_code or not task.runs_code] for suite in suites}

"""Suites of tasks of lm-evaluation-harness, with their prompts and scores."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hft_trl.errors import HFTError

TASKS = Path(__file__).parent / "tasks"
"""Folder of the tasks that the harness lacks in the needed form."""


@dataclass(frozen=True)
class Task:
    """A task or group of the harness, or one of ours in [`TASKS`]."""

    name: str
    figures: dict[str, str]  # "TASK METRIC,FILTER" by heading; the first one counts in the suite's average
    num_fewshot: int | None = None  # examples in the prompt, by default the task's own number
    chat: bool = False  # whether prompts have the form of the model's chat template
    runs_code: bool = False  # whether grading runs what the model wrote


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
        Task("hft_hotpotqa_closed_book", {"HotpotQA": "hft_hotpotqa_closed_book exact_match,remove_whitespace"}, 5),
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
    """Return the suites in a comma-separated list, and check that the harness is installed."""
    suites = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in suites if name not in SUITES]
    if unknown or not suites:
        raise HFTError(f"unknown suite {', '.join(unknown) or repr(names)}: choose from {', '.join(SUITES)}.")
    if find_spec("lm_eval") is None:
        raise HFTError("evaluation needs lm-eval: run pip install -c constraints.txt -e '.[eval]'.")
    return suites

"""The keys above the sections of a continual run."""

from dataclasses import dataclass, field

from hft_trl.continual.rounds import Approach
from hft_trl.errors import HFTError
from hft_trl.recipe.arguments import RunArguments, at_home


@dataclass
class ContinualArguments(RunArguments):
    """
    What belongs to a continual run as a whole: the keys above the sections, beside those of [`RunArguments`].

    Args:
        benchmark (`str`, *optional*):
            TRACE's folder, any folder with a `tasks.yaml`, `"demo"` for the embedded mini benchmark, or `"none"` for
            none, where a file names one.
        tasks (`str`, *optional*):
            YAML file with tasks of one's own, which are learned after the benchmark's.
        approach (`str`, *optional*, defaults to `"sequential"`):
            See [`~hft_trl.continual.rounds.plan_rounds`].
        replay_share (`float`, *optional*, defaults to `0.1`):
            Share of the rows of each earlier task that replay mixes in.
        gem_memory (`int`, *optional*, defaults to `64`):
            Rows of each earlier task in GEM's memory.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Longest prediction, in tokens (TRACE's `max_ans_len`).
        eval_batch_size (`int`, *optional*, defaults to `64`):
            Prompts that a process answers at a time.
    """

    benchmark: str | None = field(default=None, metadata={"help": "TRACE's folder, demo or none."})
    tasks: str | None = field(default=None, metadata={"help": "YAML file with tasks of your own."})
    approach: Approach = field(default="sequential", metadata={"help": "How the tasks are learned."})
    replay_share: float = field(
        default=0.1, metadata={"help": "Share of each earlier task's rows that replay mixes in."}
    )
    gem_memory: int = field(default=64, metadata={"help": "Rows of each earlier task in GEM's memory."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest prediction, in tokens."})
    eval_batch_size: int = field(default=64, metadata={"help": "Prompts answered at a time."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benchmark == "none":
            self.benchmark = None
        self.benchmark, self.tasks = (path and at_home(path) for path in (self.benchmark, self.tasks))
        if self.benchmark is None and self.tasks is None:
            raise HFTError("there is no task: give a benchmark (such as demo), or a YAML file with tasks of your own.")
        if not 0 <= self.replay_share <= 1:
            raise HFTError(f"replay_share is {self.replay_share!r}: it must be from 0 to 1.")
        for name, number, what in (
            ("gem_memory", self.gem_memory, "the rows kept of each earlier task"),
            ("eval_batch_size", self.eval_batch_size, "the prompts that a process answers at a time"),
        ):
            if number < 1:
                raise HFTError(f"{name} is {number!r}: it must be at least 1, {what}.")
        if self.approach == "individual" and self.evaluate:
            raise HFTError(
                f"evaluate is {self.evaluate!r}, but individual leaves no model that learned all tasks: drop it, and evaluate "
                "the rounds' models with hft-trl evaluate."
            )

"""Define the settings of continual runs."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hft_trl.errors import HFTError
from hft_trl.recipe.arguments import RunArguments, at_home
from hft_trl.recipe.folder import place
from hft_trl.saved_models.digests import content_digest

ADAPTER_FOLDER = "adapter"  # of a round's folder
Approach = Literal["sequential", "gem", "replay", "lora", "o_lora", "multitask", "individual"]


@dataclass
class ContinualArguments(RunArguments):
    """
    Define the settings of a continual run, in addition to those of every run.

    Args:
        benchmark (`str`, *optional*): TRACE's folder, one with a `tasks.yaml`, `"demo"` (embedded) or `"none"`.
        tasks (`str`, *optional*): YAML file of your own tasks, which are learned after the benchmark's.
        approach (`str`, *optional*, defaults to `"sequential"`): See [`~hft_trl.continual.rounds.plan_rounds`].
        replay_share (`float`, *optional*, defaults to `0.1`): Share of each earlier task's rows that replay adds.
        gem_memory (`int`, *optional*, defaults to `64`): Rows of each earlier task in GEM's memory.
        max_new_tokens (`int`, *optional*, defaults to `512`): Maximum number of tokens of a prediction.
        eval_batch_size (`int`, *optional*, defaults to `64`): Number of prompts that a process answers at a time.
    """

    benchmark: str | None = None
    tasks: str | None = None
    approach: Approach = "sequential"
    replay_share: float = 0.1
    gem_memory: int = 64
    max_new_tokens: int = 512
    eval_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benchmark == "none":
            self.benchmark = None
        self.benchmark, self.tasks = (path and at_home(path) for path in (self.benchmark, self.tasks))
        if self.benchmark is None and self.tasks is None:
            raise HFTError("there is no task: give a benchmark (such as demo), or a YAML file with tasks of your own.")
        if not 0 <= self.replay_share <= 1:
            raise HFTError(f"replay_share is {self.replay_share!r}: it must be from 0 to 1.")
        for name in ("gem_memory", "max_new_tokens", "eval_batch_size"):
            if vars(self)[name] < 1:
                raise HFTError(f"{name} is {vars(self)[name]!r}: it must be at least 1.")
        if self.approach == "individual" and self.evaluate:
            raise HFTError(
                f"evaluate is {self.evaluate!r}, but individual leaves no model that learned all tasks: drop it, and "
                "use hft-trl evaluate on the rounds' models."
            )


@dataclass
class LoRAArguments:
    """
    Define a LoRA adapter, with the names of PEFT's `LoraConfig`, whose types TRL's parser cannot read.

    Args:
        r (`int`, *optional*, defaults to `8`): Rank.
        lora_alpha (`int`, *optional*, defaults to `16`): The product of the matrices is scaled by `lora_alpha / r`.
        lora_dropout (`float`, *optional*, defaults to `0.0`): Dropout on the adapter's input.
        target_modules (`list[str]`, *optional*): Modules to adapt, by default `["all-linear"]`: all but the head.
        o_lora_lambda (`float`, *optional*, defaults to `0.5`): Factor of O-LoRA's penalty (its lambda_1).
    """

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    o_lora_lambda: float = 0.5

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("r", self.r >= 1, "at least 1"),
            ("lora_alpha", self.lora_alpha >= 1, "at least 1"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "from 0 to below 1"),
            ("target_modules", bool(self.target_modules), "all-linear, or names of modules"),
            ("o_lora_lambda", self.o_lora_lambda >= 0, "0 or more"),
        ):
            if not fits:
                raise HFTError(f"lora.{name} is {vars(self)[name]!r}: it must be {range_}.")


@dataclass(frozen=True)
class Adapter:
    """An adapter that a round trains instead of the model's own weights."""

    lora: LoRAArguments
    start: Path | None = None  # folder of the round whose adapter is trained further, None for a new adapter
    earlier: tuple[
        Path, ...
    ] = ()  # folders of the rounds to whose adapters, merged into the model, it is kept orthogonal

    @property
    def folders(self) -> list[Path]:
        """Folders of all rounds whose adapters it needs."""
        return [*filter(None, [self.start]), *self.earlier]

    def settings(self, folder: Path) -> dict[str, Any]:
        """What the trained weights depend on, for a round in `folder`."""
        content = asdict(self.lora)
        if not self.earlier:
            del content["o_lora_lambda"]  # there is no penalty
        return {
            **content,
            "start": place(str(self.start), folder) if self.start is not None else None,
            "earlier": [place(str(other), folder) for other in self.earlier],
            "content": [content_digest(other / ADAPTER_FOLDER) for other in self.folders],
        }

"""Define the settings of continual runs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from hft_trl.errors import HFTError
from hft_trl.recipe.arguments import RunArguments, key
from hft_trl.recipe.folder import place
from hft_trl.saved_models.digests import content_digest

ADAPTER_FOLDER = "adapter"  # of a round's folder
ADAPTERS = ("lora", "o_lora")
"""Approaches that train an adapter, so no half of the model is selected."""
Approach = Literal["sequential", "gem", "replay", "lora", "o_lora", "multitask", "individual"]
NEEDED = {
    **{"gem": "quadprog", "lora": "peft", "o_lora": "peft"},
    **{"edit_similarity": "rapidfuzz", "rouge_l": "rouge_score"},
}
"""Libraries of the approaches and metrics."""


@dataclass
class ContinualArguments(RunArguments):
    """Define the settings of a continual run, in addition to those of every run."""

    benchmark: str | None = key("TRACE's folder, one with a tasks.yaml, demo (embedded) or none.", None)
    tasks: str | None = key("YAML file of your own tasks, learned after the benchmark's.", None)
    approach: Approach = key("How the tasks are learned, one after the other or in one round.", "sequential")
    replay_share: float = key("Share of each earlier task's rows that replay adds.", 0.1)
    gem_memory: int = key("Rows of each earlier task in GEM's memory.", 64)
    max_new_tokens: int = key("Tokens per prediction at most.", 512)
    eval_batch_size: int = key("Prompts that a process answers at a time.", 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benchmark == "none":
            self.benchmark = None
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
    """Define a LoRA adapter, with the names of PEFT's `LoraConfig`, whose types TRL's parser cannot read."""

    r: int = key("Rank of the adapter.", 8)
    lora_alpha: int = key("Scale of the adapter, times its rank.", 16)
    lora_dropout: float = key("Dropout before the adapter.", 0.0)
    target_modules: list[str] = key(
        "Modules with an adapter; all-linear: every linear layer but the head.", ["all-linear"]
    )
    o_lora_lambda: float = key("Factor of O-LoRA's penalty, its lambda_1.", 0.5)


@dataclass(frozen=True)
class Adapter:
    """An adapter that a round trains instead of the model's own weights."""

    lora: LoRAArguments
    start: Path | None = None  # folder of the round whose adapter is trained further, None for a new adapter
    earlier: tuple[Path, ...] = ()  # rounds to whose adapters, merged into the model, it is kept orthogonal

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


def check_installed(names: Iterable[str]) -> None:
    """Check that the libraries of the named approaches and metrics are installed."""
    for name in names:
        if name in NEEDED and find_spec(NEEDED[name]) is None:
            raise HFTError(f"{name} needs {NEEDED[name]}: run pip install -c constraints.txt -e '.[continual]'.")

"""The keys of a recipe: what its sections take beside the fields of TRL's configs and of `HFTConfig`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError


def at_home(path: str) -> str:
    """A path with the user's own folder in place of a leading `~`; hub ids and other paths as they are."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


@dataclass
class RunArguments:
    """
    What belongs to the run as a whole: the keys above the sections.

    Args:
        output_dir (`str`):
            Folder of the run; each stage gets a folder in it.
        method (`str`, *optional*, defaults to `"hft"`):
            Method of every stage, `"hft"` or `"fft"`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace what earlier runs left in the stages' folders.
        evaluate (`str`, *optional*):
            Suites to run on the base and each stage's model at the end, such as `"general,knowledge"`. By default the
            embedded world's probes where the base is the embedded model, elsewhere nothing.
    """

    output_dir: str = field(metadata={"help": "Folder of the run; each stage gets a folder in it."})
    method: Literal["hft", "fft"] = field(default="hft", metadata={"help": "Method of every stage."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what output_dir holds."})
    evaluate: str | None = field(
        default=None, metadata={"help": "Suites to run at the end, such as general,knowledge; see hft-trl evaluate."}
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise HFTError("output_dir is empty: give the folder of the run, such as runs/mine.")
        self.output_dir = str(Path(self.output_dir).expanduser())  # as the trainer's arguments do with theirs


@dataclass
class ModelArguments:
    """
    The model that the first stage starts from; the names are those of TRL's `ModelConfig`.

    Args:
        model_name_or_path (`str`):
            Hub id or folder, or `"demo"` for the embedded model.
        model_revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit on the hub.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Type in which the weights are loaded, trained and saved. HFT refuses one that rounds the file's.
        attn_implementation (`str`, *optional*):
            Attention implementation.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the hub repository may run.
        chat_template (`str`, *optional*):
            `"tulu"` or the path of a `.jinja` file; by default the tokenizer's own, Tülu's if it has none.
    """

    model_name_or_path: str = field(metadata={"help": "Hub id or folder, or demo."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="float32", metadata={"help": "Type in which the weights are loaded, trained and saved."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the hub repository."})
    chat_template: str | None = field(
        default=None,
        metadata={"help": "tulu or a .jinja file; by default the tokenizer's own, Tülu's if it has none."},
    )

    def __post_init__(self) -> None:
        self.model_name_or_path = at_home(self.model_name_or_path)
        self.chat_template = at_home(self.chat_template) if self.chat_template else None


@dataclass
class LoRAArguments:
    """
    A LoRA adapter; the names are those of PEFT's `LoraConfig`, whose own types TRL's parser can't read.

    Args:
        r (`int`, *optional*, defaults to `8`):
            Rank.
        lora_alpha (`int`, *optional*, defaults to `16`):
            The product of the two matrices counts `lora_alpha / r` times.
        lora_dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of what the adapter reads.
        target_modules (`list[str]`, *optional*, defaults to `["all-linear"]`):
            Names of the modules that have an adapter, such as `["q_proj", "v_proj"]`, or all linear ones but the head.
        o_lora_lambda (`float`, *optional*, defaults to `0.5`):
            Factor of O-LoRA's penalty (its lambda_1), see [`~hft_trl.continual.adapters.OLoRATrainer`].

    Raises:
        [`HFTError`]: If a value is out of its range.
    """

    r: int = field(default=8, metadata={"help": "Rank."})
    lora_alpha: int = field(default=16, metadata={"help": "The product counts lora_alpha / r times."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what the adapter reads."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of modules, or all-linear."}
    )
    o_lora_lambda: float = field(default=0.5, metadata={"help": "Factor of O-LoRA's penalty."})

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


ADAPTER_FOLDER = "adapter"
"""Folder in that of a stage, with its adapter alone."""


@dataclass(frozen=True)
class Adapter:
    """
    An adapter that a stage learns instead of the model's own weights.

    Attributes:
        lora ([`LoRAArguments`]): Its settings.
        start (`Path`, *optional*): Folder of the stage whose adapter it goes on with, on the same model; by default it is new.
        earlier (`tuple[Path, ...]`): Folders of the stages to whose adapters, merged into the model, it is kept orthogonal.
    """

    lora: LoRAArguments
    start: Path | None = None
    earlier: tuple[Path, ...] = ()


@dataclass
class DataArguments:
    """
    What a stage adds to TRL's config.

    Args:
        dataset (`str`, *optional*):
            Hub id, folder, `.jsonl`, `.json` or `.parquet` file, or `"demo"` for the embedded data. Without it a stage
            takes `datasets`, TRL's mixture of data sets.
        dataset_config (`str`, *optional*):
            Configuration on the hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split to train on, also a part such as `"train[:1000]"`.
        eval_split (`str`, *optional*):
            Split to evaluate on, as `eval_strategy` says.
        method (`str`, *optional*):
            This stage's method, if it is another than the run's.
        drop_equal_pairs (`bool`, *optional*, defaults to `False`):
            Whether to drop preference pairs whose sides are equal instead of refusing them.
        reference_quantization (`str`, *optional*):
            Hold the reference in `"8bit"` or `"4bit"` through bitsandbytes. Its log-probabilities are then rounded.
    """

    dataset: str | None = field(
        default=None, metadata={"help": "Hub id, folder, .jsonl, .json or .parquet file, or demo."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration on the hub."})
    split: str = field(default="train", metadata={"help": "Split to train on, such as train[:1000]."})
    eval_split: str | None = field(default=None, metadata={"help": "Split for eval_strategy."})
    method: Literal["hft", "fft"] | None = field(
        default=None, metadata={"help": "This stage's method, if it is another than the run's."}
    )
    drop_equal_pairs: bool = field(
        default=False, metadata={"help": "Drop preference pairs whose sides are equal instead of refusing them."}
    )
    reference_quantization: Literal["8bit", "4bit"] | None = field(
        default=None, metadata={"help": "Hold the reference in 8 or 4 bits, through bitsandbytes."}
    )

    def __post_init__(self) -> None:
        self.dataset = at_home(self.dataset) if self.dataset else None


@dataclass
class HFTArguments(HFTConfig):
    """
    [`HFTConfig`] for a flat parser, in which `--seed` belongs to the trainer's config.

    Args:
        hft_seed (`int`, *optional*):
            Seed of the selection. By default the trainer's `seed`.
    """

    seed: int = field(init=False, default=42)
    hft_seed: int | None = field(
        default=None, metadata={"help": "Seed of the selection; by default the trainer's seed."}
    )

    def config(self, seed: int) -> HFTConfig:
        """The settings as a plain [`HFTConfig`], with the trainer's `seed` unless `hft_seed` is set."""
        values = asdict(self)
        own_seed = values.pop("hft_seed")
        return HFTConfig(**{**values, "seed": seed if own_seed is None else own_seed})


@dataclass
class StageArguments:
    """
    What a single-stage recipe adds to the flags of TRL's own scripts.

    Args:
        chat_template (`str`, *optional*):
            See [`ModelArguments`].
        drop_equal_pairs (`bool`, *optional*, defaults to `False`):
            See [`DataArguments`].
        reference_quantization (`str`, *optional*):
            See [`DataArguments`]. For the preference stage only.
        overwrite (`bool`, *optional*, defaults to `False`):
            See [`RunArguments`].
    """

    chat_template: str | None = field(
        default=None,
        metadata={"help": "tulu or a .jinja file; by default the tokenizer's own, Tülu's if it has none."},
    )
    drop_equal_pairs: bool = field(
        default=False, metadata={"help": "Drop preference pairs whose sides are equal instead of refusing them."}
    )
    reference_quantization: Literal["8bit", "4bit"] | None = field(
        default=None, metadata={"help": "Hold the reference in 8 or 4 bits, through bitsandbytes."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what output_dir holds."})

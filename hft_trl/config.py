"""What to train: the settings of Half Fine-Tuning."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hft_trl.errors import HFTError

METHODS = ("hft", "fft")
STRATEGIES = ("category", "layer", "model")
RESELECTS = ("fresh", "same", "complement")
FROZEN_DTYPES = (None, "bfloat16", "float16")
FROZEN_QUANTIZATIONS = (None, "int8", "nf4")
# What saves memory or disk and leaves the selection as it is.
STORAGE = ("frozen_dtype", "frozen_quantization", "share_reference", "delta_checkpoints", "optimizer_in_backward")


@dataclass
class HFTConfig:
    """
    Settings of Half Fine-Tuning (HFT), used the way a `peft_config` is.

    Args:
        method (`str`, *optional*, defaults to `"hft"`):
            `"hft"` trains a part of the transformer layers, `"fft"` (full fine-tuning) trains all of them and leaves
            the parent trainer's behaviour untouched.
        ratio (`float`, *optional*, defaults to `0.5`):
            Share of the transformer layers' parameters that learn, in (0, 1] (the paper sweeps 10 % to 100 %).
        strategy (`str`, *optional*, defaults to `"category"`):
            `"category"` takes the share of each category (self-attention, feed-forward, norm, ...): the paper's
            choice, `"layer"` takes whole layers, `"model"` takes matrices whatever their category.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the selection. It is used by a generator of its own: no global random state is read or written.
        train_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the input embedding learns. Freezing it costs knowledge-intensive ability (paper, ablation). With
            tied embeddings, the embedding and the output head are one parameter, which learns only if both may.
        train_lm_head (`bool`, *optional*, defaults to `True`):
            Whether the output head learns.
        train_final_norm (`bool`, *optional*, defaults to `True`):
            Whether the norm after the last layer learns.
        exclude (`list[str]`, *optional*):
            Regular expressions, searched in parameter names. What matches is always frozen and does not count in the
            shares.
        reselect (`str`, *optional*, defaults to `"fresh"`):
            How this stage's selection relates to the one that its start model was trained with: `"fresh"` draws a new
            one (the paper's choice), `"same"` keeps it, `"complement"` trains what was frozen. A start model that was
            not trained with HFT has nothing to keep, so the draw is fresh in any case.
        frozen_dtype (`str`, *optional*):
            Type in which the frozen half is held while training, `"bfloat16"` or `"float16"`, by default the model's own.
            Needs mixed precision of that type. What is saved is the start model's own frozen half, never a rounded one.
        frozen_quantization (`str`, *optional*):
            Hold the frozen matrices of attention and feed-forward in `"int8"` or `"nf4"` (4 bits) while training, through
            bitsandbytes. What is saved is the start model's own frozen half. For one process and DDP.
        share_reference (`bool`, *optional*, defaults to `True`):
            Whether the frozen half of policy and reference is stored once in preference training, where the backend can
            (one process, DDP). The losses are the same to the last bit.
        delta_checkpoints (`bool`, *optional*, defaults to `False`):
            Whether checkpoints during training hold the trainable parameters only, and the rest is taken from the start
            model on resuming. The final model is always whole. For one process and DDP; refused under FSDP and DeepSpeed.
        optimizer_in_backward (`bool`, *optional*, defaults to `False`):
            Whether each parameter is updated inside the backward pass, as soon as its gradient is there, and the gradient
            freed, so that no two gradients are there at once. The trained weights are the same to the last bit. For one
            process, without gradient accumulation or clipping.

    Raises:
        [`HFTError`]: If a value is out of its range.
    """

    method: Literal["hft", "fft"] = field(
        default="hft", metadata={"help": "Train half of the transformer layers (hft) or all of them (fft)."}
    )
    ratio: float = field(default=0.5, metadata={"help": "Share of the layers' parameters that learn, in (0, 1]."})
    strategy: Literal["category", "layer", "model"] = field(
        default="category", metadata={"help": "Take the share of each category, of the layers, or of the whole model."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the selection."})
    train_embeddings: bool = field(default=True, metadata={"help": "Whether the input embedding learns."})
    train_lm_head: bool = field(default=True, metadata={"help": "Whether the output head learns."})
    train_final_norm: bool = field(default=True, metadata={"help": "Whether the norm after the last layer learns."})
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "Regular expressions on parameter names: always frozen, left out of the shares."},
    )
    reselect: Literal["fresh", "same", "complement"] = field(
        default="fresh", metadata={"help": "How the selection relates to the one the start model was trained with."}
    )
    frozen_dtype: Literal["bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Type in which the frozen half is held while training."}
    )
    frozen_quantization: Literal["int8", "nf4"] | None = field(
        default=None, metadata={"help": "Hold the frozen half's matrices in 8 or 4 bits while training."}
    )
    share_reference: bool = field(
        default=True, metadata={"help": "Store the frozen half of policy and reference once, where the backend can."}
    )
    delta_checkpoints: bool = field(
        default=False, metadata={"help": "Keep only the trainable parameters in checkpoints during training."}
    )
    optimizer_in_backward: bool = field(
        default=False, metadata={"help": "Update each parameter inside the backward pass, and free its gradient."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", METHODS),
            ("strategy", STRATEGIES),
            ("reselect", RESELECTS),
            ("frozen_dtype", FROZEN_DTYPES),
            ("frozen_quantization", FROZEN_QUANTIZATIONS),
        ):
            value = self.__dict__[name]
            if value not in allowed:
                raise HFTError(f"hft.{name} is {value!r}: it must be one of {', '.join(map(str, allowed))}.")
        if self.frozen_dtype and self.frozen_quantization:
            raise HFTError(
                f"hft.frozen_dtype is {self.frozen_dtype} and hft.frozen_quantization is {self.frozen_quantization}: a frozen "
                "matrix is held in one of the two, so leave the other out."
            )
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1:
            raise HFTError(f"hft.ratio is {self.ratio!r}: it must be a number in (0, 1], such as 0.5.")
        self.ratio = float(self.ratio)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise HFTError(f"hft.seed is {self.seed!r}: it must be a whole number, such as 42.")
        if isinstance(self.exclude, str):
            raise HFTError(f"hft.exclude is the string {self.exclude!r}: give a list of regular expressions.")
        self.exclude = list(self.exclude or [])
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise HFTError(f"hft.exclude holds {pattern!r}, which is no regular expression: {error}.") from error

    def selecting(self) -> dict[str, Any]:
        """The settings that the selection depends on, without those that only save memory or disk."""
        return {key: value for key, value in asdict(self).items() if key not in STORAGE}

"""What to train: the settings of Half Fine-Tuning."""

import inspect
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hft_trl.errors import HFTError

Strategy = Literal["category", "layer", "model", "importance", "element"]
Importance = Literal["weight_norm", "gradient_norm", "wanda", "snr"]
CALIBRATED = ("gradient_norm", "wanda")
PATH = "source_texts"  # which another machine may have elsewhere

# Settings that save memory or communication and do not affect the selection
STORAGE = ("frozen_dtype", "frozen_quantization", "share_reference", "replicate_frozen", "optimizer_in_backward")


@dataclass
class HFTConfig:
    """
    Settings of Half Fine-Tuning (HFT), used the way a `peft_config` is.

    Args:
        method (`str`, *optional*, defaults to `"hft"`):
            Train a part of the transformer layers (`"hft"`) or all of them (`"fft"`). With `"fft"` training is that of
            the parent trainer.
        ratio (`float`, *optional*, defaults to `0.5`):
            Share of the layers' parameters that learn, in (0, 1]. The paper tests 10 % to 100 %.
        strategy (`str`, *optional*, defaults to `"category"`):
            How the trained half is chosen: at random per category, by layer, over the model, by importance, or by
            element. `"category"` draws matrices of each category (self-attention, feed-forward, norm, ...), as in the
            paper, `"layer"` takes whole layers, `"model"` draws matrices regardless of category, `"importance"` takes
            the most or least important matrices of each category, and `"element"` draws single elements of every
            matrix, which saves neither memory nor time.
        importance (`str`, *optional*, defaults to `"weight_norm"`):
            Score that ranks the matrices with strategy `"importance"`. It is the root mean square of a matrix's
            elements (`"weight_norm"`), of their gradients (`"gradient_norm"`) or of the elements times their inputs on
            `source_texts` (`"wanda"`), or the signal-to-noise ratio of the singular values (`"snr"`).
            `"gradient_norm"` and `"wanda"` are for one process and DDP.
        importance_order (`str`, *optional*, defaults to `"most"`):
            Whether the `"most"` or the `"least"` important matrices learn.
        calibration_samples (`int`, *optional*, defaults to `32`):
            Number of training rows for `"gradient_norm"`, or of blocks of `source_texts` for `"wanda"`.
        source_texts (`str`, *optional*):
            Text of what the model shall keep, for `"wanda"`: a text file, or `.jsonl` rows with a `text`. With the
            embedded model the default (and `"demo"`) is the embedded world's own text.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the selection. No global random state is read or written.
        train_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the input embedding learns. An embedding that is tied to the output head learns only if both
            settings are true. In the paper freezing it costs ability; an instruct model kept more (docs/halves.md).
        train_lm_head (`bool`, *optional*, defaults to `True`):
            Whether the output head learns.
        train_final_norm (`bool`, *optional*, defaults to `True`):
            Whether the norm after the last layer learns.
        exclude (`list[str]`, *optional*):
            Regular expressions on the names of parameters that are always frozen. They are searched in the names.
            Parameters that match do not count in the shares.
        reselect (`str`, *optional*, defaults to `"fresh"`):
            How the selection relates to the one that the start model was trained with. `"fresh"` draws a new one (the
            paper's choice), `"same"` keeps it, `"complement"` trains what was frozen. If the start model was not
            trained with HFT, a new one is drawn.
        frozen_dtype (`str`, *optional*):
            Type in which the frozen half is held while training. By default the model's own. Needs mixed precision of
            that type. Saved models have the start model's own frozen half, never a rounded one.
        frozen_quantization (`str`, *optional*):
            Hold the frozen matrices of attention and feed-forward in 8 bits (`"int8"`) or 4 bits (`"nf4"`) while
            training. They are quantized through bitsandbytes. Saved models have the start model's own frozen half. For
            one process and DDP.
        share_reference (`bool`, *optional*, defaults to `True`):
            Store the frozen half of policy and reference once in preference training, where the backend can. These are
            one process, DDP, and FSDP2 with `replicate_frozen`. The losses are the same to the last bit.
        replicate_frozen (`bool`, *optional*, defaults to `False`):
            Keep the frozen half whole in every process under FSDP2. It needs more memory on every GPU and is not
            gathered in every step. The losses are the same to the last bit. Rejected under DeepSpeed, and in mixed
            precision of another type than the frozen half's (see `frozen_dtype`).
        optimizer_in_backward (`bool`, *optional*, defaults to `False`):
            Update each parameter inside the backward pass, and free its gradient. Hardly more than one gradient exists
            at a time. The trained weights are the same to the last bit. For one process, without gradient accumulation
            or clipping.
    """

    method: Literal["hft", "fft"] = "hft"
    ratio: float = 0.5
    strategy: Strategy = "category"
    importance: Importance = "weight_norm"
    importance_order: Literal["most", "least"] = "most"
    calibration_samples: int = 32
    source_texts: str | None = None
    seed: int = 42
    train_embeddings: bool = True
    train_lm_head: bool = True
    train_final_norm: bool = True
    exclude: list[str] = field(default_factory=list)
    reselect: Literal["fresh", "same", "complement"] = "fresh"
    frozen_dtype: Literal["bfloat16", "float16"] | None = None
    frozen_quantization: Literal["int8", "nf4"] | None = None
    share_reference: bool = True
    replicate_frozen: bool = False
    optimizer_in_backward: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(HFTConfig).items():
            kinds = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
            allowed = [value for kind in kinds for value in get_args(kind)]
            if allowed and vars(self)[name] not in (*allowed, vars(HFTConfig)[name]):
                raise HFTError(f"hft.{name} is {vars(self)[name]!r}: it must be one of {', '.join(allowed)}.")
            if hint is bool and not isinstance(vars(self)[name], bool):  # the string "false" is true
                raise HFTError(f"hft.{name} is {vars(self)[name]!r}: it must be True or False, without quotes.")
        if self.frozen_dtype and self.frozen_quantization:
            raise HFTError(
                f"hft.frozen_dtype is {self.frozen_dtype!r} and hft.frozen_quantization is "
                f"{self.frozen_quantization!r}: a frozen matrix is held in one of the two, so leave the other out."
            )
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1:
            raise HFTError(f"hft.ratio is {self.ratio!r}: it must be a number in (0, 1], such as 0.5.")
        self.ratio = float(self.ratio)
        if type(self.seed) is not int:
            raise HFTError(f"hft.seed is {self.seed!r}: it must be a whole number, such as 42.")
        samples = self.calibration_samples
        if type(samples) is not int or samples < 1:
            raise HFTError(f"hft.calibration_samples is {samples!r}: it must be a whole number of rows, such as 32.")
        for name in self._unused():
            if vars(self)[name] != vars(HFTConfig)[name]:
                cause = "importance" if self.strategy == "importance" else "strategy"
                raise HFTError(
                    f"hft.{name} is {vars(self)[name]!r}, which is not used with hft.{cause} {vars(self)[cause]!r}: "
                    f"drop it (in a stage's own section, set it to {vars(HFTConfig)[name]!r}), or change hft.{cause}."
                )
        if isinstance(self.exclude, str):
            raise HFTError(f"hft.exclude is the string {self.exclude!r}: give a list of regular expressions.")
        self.exclude = list(self.exclude or [])
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise HFTError(f"hft.exclude holds {pattern!r}, which is no regular expression: {error}.") from error

    @property
    def calibrated(self) -> str | None:
        """Return the importance that needs rows of data, `None` for the others."""
        asked = self.method == "hft" and self.strategy == "importance" and self.importance in CALIBRATED
        return self.importance if asked else None

    def _unused(self) -> set[str]:
        """Return the settings of strategies that are not chosen."""
        if self.strategy != "importance":
            return {"importance", "importance_order", "calibration_samples"}
        return set() if self.importance in CALIBRATED else {"calibration_samples"}

    def selecting(self) -> dict[str, Any]:
        """Return the settings that the selection depends on."""
        return {key: value for key, value in asdict(self).items() if key not in {*STORAGE, PATH, *self._unused()}}

    def by_shape(self) -> "HFTConfig":
        """Return the settings of a half with the same shares that needs no weights, data or masks."""
        if self.strategy not in ("importance", "element"):
            return self
        names = ("importance", "importance_order", "calibration_samples")
        return replace(self, strategy="category", **{name: vars(HFTConfig)[name] for name in names})


# A flag's help is the first sentence of its setting's entry in the docstring
ENTRY = r"^ {4}(\w+) \(.*\):\n((?: {8}.*\n?)+)"
HELP = dict(re.findall(ENTRY, inspect.getdoc(HFTConfig) or "", re.MULTILINE))
for setting in fields(HFTConfig):
    plain = " ".join(re.sub('[`"]', "", HELP.get(setting.name, "")).split())
    setting.metadata = {"help": plain.partition(". ")[0].rstrip(".") + "."}

"""TRL's trainers with a half that learns: thin subclasses over one mixin."""

import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from transformers.utils import logging
from trl import DPOTrainer, SFTTrainer

from hft_trl import reference, zero
from hft_trl.backends import check_backend
from hft_trl.checkpoints import check_resumable, last_finite_checkpoint, selection_of
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.frozen import FrozenHalf
from hft_trl.selection import SELECTION_FILE, Selection, select
from hft_trl.weights import check_not_rounded, combined_digest, fingerprints

logger = logging.get_logger(__name__)

CITATION = """\
@inproceedings{hui2025hft,
  title     = {{HFT: Half Fine-Tuning for Large Language Models}},
  author    = {Hui, Tingfeng and Zhang, Zhenyu and Wang, Shuohuan and Xu, Weiran and Sun, Yu and Wu, Hua},
  booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics},
  year      = {2025},
  url       = {https://arxiv.org/abs/2404.18466}
}"""


class HFTMixin:
    """
    Gives any TRL trainer of a causal LM a half that learns. Put it before the trainer: `class MyTrainer(HFTMixin, KTOTrainer): ...`

    Every argument of the parent stays as it is. The selection is drawn and applied as soon as the parent has loaded
    the model, before anything wraps it, so the optimizer and every backend see the trainable half only. The frozen
    half is fingerprinted then, and checked whenever the model is saved and when training ends.

    Args:
        hft_config ([`HFTConfig`], *optional*):
            What to train. Defaults to `HFTConfig()`, the paper's category-level half.

    Attributes:
        hft_selection ([`Selection`]): Which parameters learn.

    Raises:
        [`HFTError`]: If HFT is asked for together with adapters or a quantised model, if `optimizers` holds frozen
            parameters, or if the reference is not the model that training starts from.
    """

    def __init__(self, *args: Any, hft_config: HFTConfig | None = None, **kwargs: Any) -> None:
        self.hft_config = hft_config if hft_config is not None else HFTConfig()
        if not isinstance(self.hft_config, HFTConfig):
            raise HFTError(f"hft_config is {self.hft_config!r}: give an HFTConfig, such as HFTConfig(ratio=0.5).")
        given, takes_reference = _arguments(super().__init__, args, kwargs)
        reference_given = given.get("ref_model") is not None
        _refuse_adapters(given)
        precomputed = given.get("args") is not None and vars(given["args"]).get("precompute_ref_log_probs")
        if takes_reference and not reference_given and not precomputed:
            reference.check_has_path(given.get("model"))
        zero.prepare(given.get("args"), self.hft_config)

        super().__init__(*args, **kwargs)

        if self.hft_config.method == "hft":
            check_backend(self.accelerator.state)
        model = self.accelerator.unwrap_model(self.model)
        self.hft_selection = self._draw_selection(model)
        self.hft_selection.apply(model)
        self._first_step = True
        if self.optimizer is not None:
            _refuse_frozen(self.optimizer, model)
        own_reference = vars(self).get("ref_model")  # also of trainers that always load it themselves
        if own_reference is not None:
            reference.freeze(own_reference)
            reference.check_is_start(model, self.accelerator.unwrap_model(own_reference), reference_given)
            if self.is_deepspeed_enabled:
                zero.log_reference(self.accelerator.state.deepspeed_plugin)
        # With a frozen embedding no input of the first layer needs a gradient, and reentrant checkpointing would then
        # pass none on to the layers.
        if self.hft_config.method == "hft" and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            model.enable_input_require_grads()

    def _draw_selection(self, model: PreTrainedModel) -> Selection:
        start = model.config._name_or_path
        selection = select(model, self.hft_config, previous=selection_of(model))
        digests = gather_object([selection.digest])
        if len(set(digests)) > 1:
            raise HFTError(
                f"the processes drew different selections ({', '.join(sorted(set(digests)))}): report a bug."
            )
        cast = zero.training_dtype(self.accelerator.state)
        if cast is not None:
            zero.cast(model, cast)
        if self.hft_config.method == "hft":
            dtypes = {name: p.dtype for name, p in model.named_parameters() if not p.is_meta}
            check_not_rounded(start, dtypes, remedy=zero.UNCAST if cast is not None else None)
        parameters = fingerprints(model.named_parameters())
        learns = set(selection.trainable) if self.hft_config.method == "hft" else parameters.keys()
        self._frozen = FrozenHalf({name: digest for name, digest in parameters.items() if name not in learns})
        start_model = {"name_or_path": start, "weights_digest": combined_digest(parameters)}
        return dataclasses.replace(selection, start_model=start_model)

    def check_frozen(self) -> None:
        """
        Compare the frozen half with its fingerprints from before training.

        Raises:
            [`RuntimeError`]: Naming the first frozen parameter that moved.
        """
        self._frozen.check(self.accelerator.unwrap_model(self.model))

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as the parent does; refuse a checkpoint of another selection, and end in an error if a frozen bit moved."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if resume_from_checkpoint and resume_from_checkpoint is not True:
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            if self.hft_config.method == "hft" or (Path(resume_from_checkpoint) / SELECTION_FILE).exists():
                check_resumable(self.hft_selection, resume_from_checkpoint)
            if self._is_trained(resume_from_checkpoint):
                self.check_frozen()
                return TrainOutput(self.state.global_step, float("nan"), {})
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self.check_frozen()
        return output

    def _is_trained(self, checkpoint: str) -> bool:
        """Take over a checkpoint of step `max_steps`. transformers would train one step more, and end in other weights."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if not 0 < self.args.max_steps <= state.global_step or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        self._load_from_checkpoint(checkpoint)
        self.state = state
        return True

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the parent's step; stop at a loss that is NaN or infinite, before the optimizer can spread it."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            checkpoint = last_finite_checkpoint(self.args.output_dir)
            raise HFTError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rate or check the "
                f"data; the last good checkpoint is {checkpoint or 'none (no checkpoint was saved yet)'}."
            )
        if self._first_step and self.hft_config.method == "hft" and not self.is_deepspeed_enabled:
            self._first_step = False
            self._warn_of_parts_without_gradient()
        return loss

    def _warn_of_parts_without_gradient(self) -> None:
        idle = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            logger.warning(
                f"{len(idle)} trainable parameters got no gradient in the first step, such as {idle[0]}. If they never "
                "do, keep them out of the selection with HFTConfig(exclude=[...])."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the parent does, with `hft_selection.json` beside the weights; never with a frozen half that moved."""
        self.check_frozen()
        if self.args.should_save:
            self.hft_selection.save(output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card and add what HFT trained."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and self.hft_config.method == "hft":
            path = Path(self.args.output_dir) / "README.md"
            card = ModelCard.load(path)
            card.data.tags = sorted({*(card.data.tags or []), "hft"})
            card.text += _card_section(self.hft_selection)
            card.save(path)


class HFTSFTTrainer(HFTMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that trains a half of the model.

    Example:

    ```python
    from hft_trl import HFTConfig, HFTSFTTrainer

    trainer = HFTSFTTrainer(model="Qwen/Qwen3-0.6B", train_dataset=dataset, hft_config=HFTConfig(ratio=0.5))
    trainer.train()
    ```
    """


class HFTDPOTrainer(HFTMixin, DPOTrainer):
    """[`~trl.DPOTrainer`] that trains a half of the policy. The reference stays wholly frozen."""


def _arguments(init: Callable[..., None], args: Any, kwargs: Any) -> tuple[dict[str, Any], bool]:
    """What the parent is given, by name as far as its signature tells, and whether it can be given a reference."""
    signature = inspect.signature(init)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given, "ref_model" in signature.parameters


def _refuse_adapters(given: dict[str, Any]) -> None:
    model = given.get("model")
    if given.get("peft_config") is not None or (isinstance(model, torch.nn.Module) and is_peft_model(model)):
        raise HFTError(
            "HFT trains the model's own weights, but a peft_config or a PEFT model was passed: drop it, or train the "
            "adapter with TRL's own trainer."
        )
    if given.get("quantization_config") is not None:
        raise HFTError("HFT trains the model's own weights, but a quantization_config was passed: drop it.")


def _refuse_frozen(optimizer: torch.optim.Optimizer, model: PreTrainedModel) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and id(p) in held]
    if frozen:
        raise HFTError(
            f"optimizers holds {len(frozen)} frozen parameters, such as {frozen[0]}: let the trainer build the optimizer "
            "(use optim, or optimizer_cls_and_kwargs), or build it from select(model, hft_config).trainable."
        )


def _card_section(selection: Selection) -> str:
    shares = "\n".join(f"| {category} | {share:.4f} |" for category, share in selection.share.items())
    settings = ", ".join(f"{key} `{value}`" for key, value in selection.config.selecting().items())
    return f"""
## Half Fine-Tuning

In this stage a random part of the parameters learned and the rest kept the bits of the start model
`{selection.start_model["name_or_path"]}` (weights `{selection.start_model["weights_digest"]}`).
Settings: {settings}. Selection `{selection.digest}`, listed in `{SELECTION_FILE}`.

| category | share that learned |
|---|---|
{shares}

Cite HFT as:

```bibtex
{CITATION}
```
"""

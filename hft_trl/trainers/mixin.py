"""What any TRL trainer of a causal LM needs so that a half of its model learns."""

import dataclasses
import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from hft_trl.backends import fsdp, zero
from hft_trl.backends.fsdp import check_backend
from hft_trl.checkpoints.preemption import StopAtStepEnd
from hft_trl.checkpoints.resumable import ResumableMixin
from hft_trl.checkpoints.whole import check_resumable, selection_of
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.files import writing
from hft_trl.frozen import replicated
from hft_trl.frozen.elements import FrozenElements
from hft_trl.frozen.half import FrozenHalf
from hft_trl.reference import sharing
from hft_trl.selection import SELECTION_FILE, Selection, select
from hft_trl.selection.marks import frozen_by_user, remember
from hft_trl.trainers import model_card
from hft_trl.trainers.compatibility import (
    check_choice,
    check_settings,
    refuse_adapters,
    refuse_frozen,
    refuse_own_optimizer,
)
from hft_trl.trainers.gradient_norms import measured_once
from hft_trl.trainers.idle import WarnOfIdleParameters
from hft_trl.trainers.optimizer_in_backward import update_in_backward
from hft_trl.weights import check_not_rounded, combined_digest, fingerprints, named_parameters

logger = logging.get_logger(__name__)


class HFTMixin(ResumableMixin):
    """
    Gives any TRL trainer of a causal LM a half that learns. Put it before the trainer: `class MyTrainer(HFTMixin, KTOTrainer): ...`

    Every argument of the parent stays as it is. The selection is drawn and applied as soon as the parent has loaded
    the model, before anything wraps it, so the optimizer and every backend see the trainable half only. The frozen
    half is fingerprinted then, and checked whenever the model is saved and when training ends. With method `"fft"` training is the
    parent's bit for bit; what [`ResumableMixin`] gives stays (sealed checkpoints, the stops at a loss that is NaN and at SIGTERM).

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
        refuse_adapters(given)
        self._frozen_dtype = self.hft_config.frozen_dtype if self.hft_config.method == "hft" else None
        self._quantization = self.hft_config.frozen_quantization if self.hft_config.method == "hft" else None
        self._updates: list[RemovableHandle] = []
        if self.hft_config.method == "hft":
            fsdp.check_launch(given.get("args"), given.get("model"))
            check_choice(given.get("args"), self.hft_config)
        if given.get("args") is not None:
            check_settings(given["args"], self.hft_config)
        if self.hft_config.optimizer_in_backward:
            refuse_own_optimizer(given)
        self._replicates = replicated.wanted(self.hft_config, given.get("args"))
        zero.prepare(given.get("args"), self.hft_config)
        with self._policy_loaded_once(given) as loaded:
            if loaded is not None:
                super().__init__(**loaded)
            else:
                if takes_reference:
                    sharing.check_has_path(given)
                super().__init__(*args, **kwargs)

        if given.get("args") is None:
            check_settings(self.args, self.hft_config)
        if self.hft_config.method == "hft":
            check_backend(self.accelerator.state)
        model = self.accelerator.unwrap_model(self.model)
        self.hft_selection = self._draw_selection(model)
        self.hft_selection.apply(model)
        self._start_types = fsdp.start_types(model) if self.hft_config.method == "hft" else {}
        self._frozen_elements = FrozenElements(model, self.hft_selection.masks) if self.hft_selection.masks else None
        if self.optimizer is not None and self.hft_config.method == "hft":
            refuse_frozen(self.optimizer, model)
        self._settle_halves(model, reference_given)
        # With a frozen embedding no input of the first layer needs a gradient, and reentrant checkpointing would then
        # pass none on to the layers.
        if self.hft_config.method == "hft" and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            model.enable_input_require_grads()
        if self.hft_config.method == "hft" and not (
            self.hft_config.optimizer_in_backward or self.is_deepspeed_enabled
        ):
            self.add_callback(WarnOfIdleParameters())
        self._preemption = StopAtStepEnd.install(self)

    def _draw_selection(self, model: PreTrainedModel) -> Selection:
        start = model.config._name_or_path
        config, previous = self.hft_config, selection_of(model)
        if previous is not None and previous.masks is not None:
            check_choice(self.args, config, after_elements=True)
        gradients = partial(measured_once, self, model, samples=config.calibration_samples, seed=config.seed)
        selection = select(model, config, previous, gradients)
        if config.method == "hft" and (kept := frozen_by_user(model)):
            self.accelerator.print(
                f"{len(kept)} parameters, such as {min(kept)}, were frozen before and stay so, outside of the shares."
            )
        digests = gather_object([selection.digest])
        if len(set(digests)) > 1:
            raise HFTError(
                f"the processes drew different selections ({', '.join(sorted(set(digests)))}): report a bug."
            )
        cast = zero.training_dtype(self.accelerator.state) if config.method == "hft" else None
        if cast is not None:
            zero.cast(model, cast)
        if self.hft_config.method == "hft":
            dtypes = {name: p.dtype for name, p in named_parameters(model) if not p.is_meta}
            check_not_rounded(start, dtypes, remedy=zero.UNCAST if cast is not None else None)
        parameters = fingerprints(named_parameters(model))
        learns = set(selection.trainable) if self.hft_config.method == "hft" else parameters.keys()
        self._frozen = FrozenHalf({name: digest for name, digest in parameters.items() if name not in learns})
        start_model = {"name_or_path": start, "weights_digest": combined_digest(parameters)}
        return dataclasses.replace(selection, start_model=start_model)

    def _policy_loaded_once(self, given: dict[str, Any]) -> AbstractContextManager[dict[str, Any] | None]:  # noqa: ARG002
        """What to call the parent with instead of what was `given`, if a trainer can make its reference of the policy."""
        return nullcontext()

    def _settle_halves(self, policy: PreTrainedModel, reference_given: bool) -> None:
        """Check the reference against the policy, hold the frozen half in its type, and store it once where that can be."""
        # Also of trainers that always load it themselves. With method fft it is the parent's business.
        own = vars(self).get("ref_model") if self.hft_config.method == "hft" else None
        reason = sharing.why_not_shared(self.args, self.hft_config)
        if own is not None:
            own = self.accelerator.unwrap_model(own, keep_torch_compile=False)
            if reason is None and sharing.is_wholly_sharded(own):
                reason = "FSDP has sharded all of it"
            sharing.freeze(own)
            if reason is not None or not sharing.is_hollow(own):
                sharing.check_is_start(policy, own, reference_given)
                reason = reason or ("ref_model was passed, which is left as it is" if reference_given else None)
        self._shares_reference = own is not None and reason is None
        if self._frozen_dtype:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            revision = (self.args.model_init_kwargs or {}).get("revision")
            rounded = None if sharded or reference_given else own
            self._frozen.hold_in(getattr(torch, self._frozen_dtype), policy, revision, rounded)
        self._whole: list[torch.nn.Parameter] = []
        if self._replicates:
            self._whole = replicated.parameters(policy, self._frozen.digests)
            replicated.check(self.accelerator, policy, self._whole, self._frozen.digests)
        if self.hft_config.replicate_frozen:
            replicated.report(self.hft_config, self.args, policy, self._whole)
        if self._shares_reference:
            sharing.tie(policy, own)
        if self._quantization:
            revision = (self.args.model_init_kwargs or {}).get("revision")
            self._frozen.quantize(self._quantization, policy, revision, own if self._shares_reference else None)
            if own is not None and not self._shares_reference:
                logger.warning(
                    f"hft.frozen_quantization leaves the reference whole, since {reason}: the policy starts beside it, and the "
                    "first rewards are not zero."
                )
        if own is not None:
            sharing.report_memory(policy, own, reason)
            if self.is_deepspeed_enabled:
                zero.log_reference(self.accelerator.state.deepspeed_plugin)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, Any]:
        """Prepare as the parent does, and tie the reference to where accelerate has put the policy."""
        policy = self.accelerator.unwrap_model(self.model)
        with replicated.left_whole(self.accelerator, policy, self._whole):
            prepared = super()._prepare_for_training(*args, **kwargs)
        if self.hft_config.optimizer_in_backward:
            self._updates = update_in_backward(self.model.parameters(), self.optimizer)
        if self._shares_reference:
            sharing.tie(self.accelerator.unwrap_model(self.model), self.accelerator.unwrap_model(self.ref_model))
        if self._frozen_elements is not None:
            self._frozen_elements.watch(self.optimizer.optimizer)  # what accelerate has wrapped
        return prepared

    def check_frozen(self) -> None:
        """
        Compare the frozen half with its fingerprints from before training.

        Raises:
            [`RuntimeError`]: Naming the first frozen parameter that moved, or of which a frozen element did.
        """
        self._frozen.check(self.accelerator.unwrap_model(self.model))
        if self._frozen_elements is not None:
            self._frozen_elements.check()

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as the parent does; refuse a checkpoint of another selection, and end in an error if a frozen bit moved."""
        try:
            with self._frozen_elements or nullcontext():
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            while self._updates:
                self._updates.pop().remove()
        self.check_frozen()
        remember(self.accelerator.unwrap_model(self.model), self.hft_selection)
        return output

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute as the parent does; stop at a loss that is no number before a backward pass that updates."""
        computed = super().compute_loss(*args, **kwargs)
        if self._updates and torch.is_grad_enabled():
            self._check_finite(computed[0] if isinstance(computed, tuple) else computed)
        return computed

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float | torch.Tensor | None:
        """The norm that the parent logs, none where the gradients are gone by then."""
        return None if self._updates else super()._get_grad_norm(*args, **kwargs)

    def _check_same_training(self, checkpoint: str) -> None:
        if self.hft_config.method == "hft" or (Path(checkpoint) / SELECTION_FILE).exists():
            check_resumable(self.hft_selection, checkpoint)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """Run the parent's step, under autocast before `train` too where the halves are held in two types."""
        with self.accelerator.autocast() if self._frozen_dtype else nullcontext():
            return super().prediction_step(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the parent does, with `hft_selection.json` beside the weights; never with a frozen half that moved."""
        self.check_frozen()
        with writing(output_dir or self.args.output_dir):
            if self.args.should_save:
                self.hft_selection.save(output_dir or self.args.output_dir)
            if fsdp.saves_shards(self.accelerator) and not _internal_call:
                # Shards are enough to resume from; what training ends with has to load anywhere.
                self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save as the parent does, in the start model's types, and its own tensors where the frozen half is held smaller."""
        if not self._start_types or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder, model = output_dir or self.args.output_dir, self.accelerator.unwrap_model(self.model)
        if state_dict is not None:
            fsdp.cast_back(state_dict, self._start_types)
        super()._save(output_dir, self._frozen.as_saved(model, state_dict, folder))
        # transformers names the type of the first parameter in memory, and loading in that one could round the others
        dtype = reduce(torch.promote_types, self._start_types.values())
        if str(model.config.dtype) not in (str(dtype), str(dtype).removeprefix("torch.")):
            model.config.dtype = dtype
            model.config.save_pretrained(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load as the parent does, if the weights, which every backend has loaded by now, hold the start model's frozen half."""
        if checkpoint is not None:
            self._frozen.check(self.accelerator.unwrap_model(self.model))
        super()._load_optimizer_and_scheduler(checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card and add what HFT trained."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and self.hft_config.method == "hft":
            model_card.add_section(Path(self.args.output_dir) / "README.md", self.hft_selection)


def _arguments(init: Callable[..., None], args: Any, kwargs: Any) -> tuple[dict[str, Any], bool]:
    """What the parent is given, by name as far as its signature tells, and whether it can be given a reference."""
    signature = inspect.signature(init)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given, "ref_model" in signature.parameters

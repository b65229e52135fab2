"""Order the steps of training with a half, for any TRL trainer of a causal LM."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from hft_trl import reference
from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError

logger = logging.get_logger(__name__)


class HFTMixin:
    """
    Add HFT to a TRL trainer. Put it first: `class HFTKTOTrainer(HFTMixin, KTOTrainer): ...`.

    The half is drawn and frozen after the parent has loaded the model and before anything wraps it. Its fingerprints
    are checked whenever the model is saved and when training ends. With method `"fft"` training is the parent's bit
    for bit.

    Args:
        hft_config ([`HFTConfig`], *optional*):
            What to train. Defaults to `HFTConfig()`, the paper's category-level half.

    Attributes:
        hft_selection ([`Selection`]): Which parameters learn.
        frozen_half ([`FrozenHalf`]): The parameters that keep their bits.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(HFTMixin):
            raise HFTError(f"{cls.__name__} names HFTMixin after the trainer, which would train all: name it first.")

    def __init__(self, *args: Any, hft_config: HFTConfig | None = None, **kwargs: Any) -> None:
        from hft_trl.trainers import preparation
        from hft_trl.trainers.case import Case
        from hft_trl.trainers.compatibility import check

        self.hft_config = hft_config if hft_config is not None else HFTConfig()
        given = preparation.check_given(super().__init__, args, kwargs, self.hft_config)
        # Of the start model on the hub. A model object does not know it
        self._revision = Case(given.get("args"), self.hft_config, given).init.get("revision")
        with self._reference_from_policy(given) as arguments:
            if arguments is not None:
                super().__init__(**arguments)
            else:
                reference.check_has_path(given)
                super().__init__(*args, **kwargs)
        policy = self.accelerator.unwrap_model(self.model)
        # The arguments that the parent has made itself, and the backend that only its accelerator shows
        check(self.args, self.hft_config, given, state=self.accelerator.state)
        self.hft_selection, self.frozen_half = preparation.draw_half(self, policy)
        self._storages = preparation.storages(self.hft_config, self.hft_selection.masks is not None)
        self._shares_reference = reference.settle(self, policy, self._storages, given.get("ref_model") is not None)
        self.frozen_half.note_forms(policy)
        preparation.check_optimizer(self, policy)
        if self.hft_config.method == "hft" and self.is_world_process_zero():
            share, config = self.hft_selection.share["layers"], self.hft_config
            logger.warning(
                f"HFT is active: {share:.1%} of the layers learn (strategy {config.strategy}, seed {config.seed}), "
                "and the rest keeps its bits."
            )
        if self.hft_config.method == "hft" or self._storages:
            self.add_callback(_Begins(self))

    def _reference_from_policy(
        self,
        given: dict[str, Any],  # noqa: ARG002
    ) -> AbstractContextManager[dict[str, Any] | None]:
        """Yield what to call the parent with if a trainer can make its reference from the policy, else `None`."""
        return nullcontext()

    def check_frozen(self) -> None:
        """Raise a [`RuntimeError`] if the frozen half differs from its fingerprints from before training."""
        self.frozen_half.check(self.accelerator.unwrap_model(self.model))
        for storage in self._storages:
            storage.check()

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as the parent does. A checkpoint of another selection and a frozen bit that moved are errors."""
        from hft_trl.selection.previous import check_resumable
        from hft_trl.trainers import preparation

        self._resumes = check_resumable(self.hft_selection, resume_from_checkpoint, self.args.output_dir)
        preparation.check_before_training(self)
        with ExitStack() as ends:
            ends.callback(self._remember)  # also where training is interrupted
            for storage in self._storages:
                storage.before_training(self)
                ends.callback(storage.training_ends, self)
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        self.check_frozen()
        return output

    def _remember(self) -> None:
        """Note the selection on the policy, once a step of it was trained."""
        from hft_trl.selection.previous import remember

        if self.state.global_step:
            remember(self.accelerator.unwrap_model(self.model), self.hft_selection)

    def _begins(self) -> None:
        """Follow the policy that accelerate has wrapped or moved, and check its frozen half."""
        policy = self.accelerator.unwrap_model(self.model)
        self.frozen_half.check_untouched(policy)
        if self._resumes:
            self.frozen_half.check(policy)
        for storage in self._storages:
            storage.training_begins(self)
        if self._shares_reference:
            reference.tie(policy, self.accelerator.unwrap_model(self.ref_model))

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float | torch.Tensor | None:
        """Return the norm that the parent logs, none where the gradients are freed by then."""
        return None if self.hft_config.optimizer_in_backward else super()._get_grad_norm(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        """Run the parent's step, under autocast if the halves may have two types."""
        two_types = self.hft_config.method == "hft" and self.hft_config.frozen_dtype
        # Before `train` accelerate has not put it around the model
        with self.accelerator.autocast() if two_types else nullcontext():
            return super().prediction_step(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the parent does, with `hft_selection.json`, but never with a frozen half that moved."""
        self.check_frozen()
        if self.args.should_save:
            self.hft_selection.save(output_dir or self.args.output_dir)
        sharded = self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if sharded and not _internal_call:  # shards are enough to resume from, but `from_pretrained` loads none
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save as the parent does, in the start model's types, and its own tensors if memory holds others."""
        folder, model = output_dir or self.args.output_dir, self.accelerator.unwrap_model(self.model)
        saves = self.args.should_save and self.hft_config.method == "hft"
        if saves:
            if state_dict is not None:
                self.frozen_half.in_start_types(state_dict)
            for storage in self._storages:
                state_dict = storage.saved(model, state_dict, folder)
        super()._save(output_dir, state_dict)
        if saves:
            self.frozen_half.write_dtype(model, folder)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write TRL's model card with the start model, the data and the selection."""
        # TRL would link a local data set to the hub
        super().create_model_card(model_name or Path(self.args.hub_model_id or self.args.output_dir).name, None, tags)
        if self.is_world_process_zero():
            from hft_trl.saved_models.model_card import complete

            complete(self.args.output_dir, self.hft_selection, dataset_name)
            # transformers copies the weights of a checkpoint to it, and uploads that folder. Otherwise the folder may
            # still hold the start model
            if self.args.push_to_hub:
                self.hft_selection.save(self.args.output_dir)


class _Begins(TrainerCallback):
    """Tell a trainer that training begins: its models are wrapped, and a checkpoint is loaded."""

    def __init__(self, trainer: HFTMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begins()

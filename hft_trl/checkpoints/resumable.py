"""Exact resume for any trainer, after it was stopped or killed."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, has_length, sort_checkpoints
from transformers.training_args import OptimizerNames

from hft_trl.checkpoints import generations, moving_reference, whole
from hft_trl.checkpoints.preemption import StopAtStepEnd
from hft_trl.errors import HFTError


class ResumableMixin:
    """
    Add exact resume to any [`~transformers.Trainer`].

    Put it before the trainer: `class MyTrainer(ResumableMixin, SFTTrainer): ...`.

    A resumed run ends in the same bits as an uninterrupted run. Checkpoints are complete or rejected, even if the
    process is killed while saving. With `enable_jit_checkpoint`, a SIGTERM ends training with a checkpoint after the
    current step. A NaN or infinite loss ends training before a checkpoint is saved. Checkpoints include a moving
    reference (`sync_ref_model`). The mixin and HFT do not need each other.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(ResumableMixin):
            raise HFTError(
                f"{cls.__name__} names ResumableMixin after the trainer, which would ignore it: name it first."
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._preemption = StopAtStepEnd.install(self)

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as the parent does. Incomplete or unsuitable checkpoints are rejected."""
        moving_reference.check(self.args)
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = whole.last_whole_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise HFTError(
                    f"no checkpoint in {self.args.output_dir} is complete, so nothing can be resumed: train without "
                    "resume_from_checkpoint."
                )
        with ExitStack() as ends:
            if self._preemption is not None:
                ends.callback(self._preemption.put_away)
            if checkpoint is not None:
                optim = OptimizerNames(self.args.optim).value
                if optim.endswith("_layerwise"):  # transformers saves a dummy in its place
                    raise HFTError(
                        f"optim is {optim}, whose state is in no checkpoint, so it would start again: train into "
                        "another output_dir, with adamw_torch_fused if that run is to be resumed."
                    )
                checkpoint, here = os.fspath(checkpoint), whole.layout(self)
                whole.check_whole(checkpoint, here["processes"], here["backend"])
                whole.check_layout(checkpoint, here, any_batch=self.args.auto_find_batch_size)
            generations.check(self.args, checkpoint)
            if checkpoint is not None:
                ends.enter_context(whole.resuming(self, checkpoint))
                moving_reference.load(self, checkpoint)
            return super().train(checkpoint, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, but skip the step that the parent takes even if none remains."""
        early = [call for call in self.callback_handler.callbacks if isinstance(call, EarlyStoppingCallback)]
        stopped = any(call.early_stopping_patience_counter >= call.early_stopping_patience for call in early)
        # Resumed after the last step
        if self.state.global_step >= self.state.max_steps or (stopped and kwargs["resume_from_checkpoint"]):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)
        if self._preemption is not None:
            self._preemption.leave()

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Return the parent's epoch and batches to skip; of a stream those of the pass that it was in."""
        steps = (max_steps, num_update_steps_per_epoch, num_train_epochs)
        found = super()._init_training_state(*steps, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None or has_length(self.train_dataset) or self.args.ignore_data_skip:
            return found
        # The parent counts as if one pass were as long as all steps
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        passes, part = divmod(saved.epoch, 1)
        return int(passes), round(part * saved.max_steps * self.args.gradient_accumulation_steps)

    def _load_callback_state(self) -> None:
        """Load what callbacks have counted, such as the patience of early stopping, but no setting of theirs."""
        super()._load_callback_state()
        for name, states in self.state.stateful_callbacks.items():
            own = [callback for callback in self.callback_handler.callbacks if type(callback).__name__ == name]
            states = states if isinstance(states, list) else [states]
            # Each save adds to the list of several callbacks
            for callback, state in zip(own, states[-len(own) :], strict=False):
                vars(callback).update(state["attributes"])

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """End training as the parent does, which forgets a best checkpoint if the run's folder was moved."""
        best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_model_checkpoint is None and best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save as the parent does, then seal the checkpoint, then rotate older ones."""
        run = Path(self._get_output_dir(trial=trial))
        checkpoint = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with whole.sealing(self, checkpoint), whole.own_names(self.accelerator.unwrap_model(self.model)):
            moving_reference.save(self, checkpoint)  # before the parent uploads the checkpoint
            super()._save_checkpoint(model, trial)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Reject weights that lack parameters, such as experts that transformers has saved under other names."""
        names: dict[int, list[str]] = {}  # tied parameters have several, and files one of them
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        missing = set(load_result.missing_keys)
        lacking = [own[0] for own in names.values() if missing.issuperset(own)]
        if lacking:
            raise HFTError(
                f"the checkpoint holds no weights named {lacking[0]} (and {len(lacking) - 1} others of the model), "
                "which would stay those of the start model: train into another output_dir. The checkpoint "
                "can be its start model."
            )
        super()._issue_warnings_after_load(load_result)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the parent's step, and reject a NaN or infinite loss before it is used or a checkpoint is saved."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            kept = [path for path in sort_checkpoints(self.args.output_dir) if whole.torn_because(path) is None]
            raise HFTError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the learning rate or check "
                f"the data; the last checkpoint is {kept[-1] if kept else 'none (no checkpoint was saved yet)'}."
            )
        return loss

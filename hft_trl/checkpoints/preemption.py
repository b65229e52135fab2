"""A SIGTERM while training: a checkpoint at the end of the step, and out."""

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from hft_trl.errors import Stopped

if TYPE_CHECKING:
    from transformers import Trainer


class _Asked(CheckpointManager):
    """Notes a SIGTERM at once. transformers waits 3 seconds first, and would lose one that comes just before the end."""

    def _sigterm_handler(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.is_checkpoint_requested = True


class StopAtStepEnd(JITCheckpointCallback):
    """
    transformers' checkpoint on SIGTERM (`enable_jit_checkpoint`), such that resuming ends in the same bits.

    transformers saves wherever it is in a step, each process for itself, and `train` then returns as if it was done.
    Here all processes agree at the end of a step, the trainer saves and rotates as it always does, and [`Stopped`] is
    raised. SIGTERM is handled from the beginning of training to its end, and as before outside of that.
    """

    @classmethod
    def install(cls, trainer: "Trainer") -> "StopAtStepEnd | None":
        """Take the place of transformers' callback, if the trainer has it."""
        callbacks = trainer.callback_handler.callbacks
        for position, callback in enumerate(callbacks):
            if type(callback) is JITCheckpointCallback:
                callback.on_train_end(trainer.args, trainer.state, trainer.control)  # puts its signal handler away
                callbacks[position] = ours = cls()
                ours.trainer = trainer
                return ours
        return None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.put_away()  # `auto_find_batch_size` begins again without an end
        self.stopping, self.saved_step = False, None
        self.jit_manager = _Asked(self.trainer)
        self.jit_manager.setup_signal_handler()

    def on_step_begin(self, *_: Any, **__: Any) -> None: ...

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None: ...

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        asked = torch.tensor(int(self.jit_manager.is_checkpoint_requested), device=args.device)
        self.stopping = bool(self.trainer.accelerator.reduce(asked, "sum").item())
        # What an epoch's end brings (evaluation, a checkpoint) belongs to its last step, so that one stops after it.
        if self.stopping and state.epoch % 1:
            control.should_save = control.should_training_stop = True

    def on_save(self, _args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.saved_step = state.global_step

    def on_epoch_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.stopping:
            return
        control.should_training_stop = True
        if state.epoch % 1:  # the epoch has not ended, training has
            control.should_log = control.should_evaluate = False
        control.should_save = control.should_evaluate or self.saved_step != state.global_step

    def leave(self) -> None:
        """Raise [`Stopped`] if a SIGTERM came. Call it when the checkpoint is saved."""
        if not self.stopping:
            return
        trainer = self.trainer
        if self.saved_step != trainer.state.global_step:  # save_strategy "best" keeps what is no new best to itself
            trainer._save_checkpoint(trainer.model, trial=None)
        self.stopping = self.jit_manager.is_checkpoint_requested = False
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        trainer._finish_current_push()
        folder = f"checkpoint-{trainer.state.global_step} in {trainer.args.output_dir}"
        first = trainer.is_world_process_zero()
        raise Stopped(f"SIGTERM; saved {folder}, the same command goes on from there." if first else "")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.put_away()

    def put_away(self) -> None:
        """Handle SIGTERM as before training, however that ended. One that came too late for a step to see is sent again."""
        manager, self.jit_manager = self.jit_manager, None
        if manager is None:
            return
        if manager._original_sigterm_handler is not None:  # one that was not set from Python can't be set again
            signal.signal(signal.SIGTERM, manager._original_sigterm_handler)
        if manager.is_checkpoint_requested:
            signal.raise_signal(signal.SIGTERM)

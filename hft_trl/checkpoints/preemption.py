"""A checkpoint at the end of the current step when a SIGTERM arrives during training."""

import signal
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hft_trl.errors import Stopped


class StopAtStepEnd(TrainerCallback):
    """
    Save on SIGTERM (`enable_jit_checkpoint`) so that a resumed run ends in the same bits.

    transformers saves in the middle of a step, without agreement between processes, and `train` returns normally. Here
    all processes agree at the end of a step, the trainer saves and rotates as usual, and [`Stopped`] is raised. The
    handler is active only during training.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.active = self.asked = self.stopping = False

    @classmethod
    def install(cls, trainer: Trainer) -> "StopAtStepEnd | None":
        """Replace transformers' callback, if the trainer has it."""
        callbacks = trainer.callback_handler.callbacks
        for position, callback in enumerate(callbacks):
            if type(callback) is JITCheckpointCallback:
                callback.on_train_end(trainer.args, trainer.state, trainer.control)  # restores the handler
                callbacks[position] = ours = cls(trainer)
                return ours
        return None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.put_away()  # `auto_find_batch_size` restarts without `on_train_end`
        self.stopping, self.saved_step = False, None
        self.before = signal.signal(signal.SIGTERM, self._ask)
        self.active = True

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        asked = torch.tensor(int(self.asked), device=args.device)
        self.stopping = bool(self.trainer.accelerator.reduce(asked, "sum").item())
        # Evaluation and checkpoint at the end of an epoch belong to its last step, so training stops after them
        if self.stopping and state.epoch % 1:
            control.should_save = control.should_training_stop = True

    def on_save(self, _args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.saved_step = state.global_step

    def on_epoch_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.stopping:
            return
        control.should_training_stop = True
        if state.epoch % 1:  # training ends in the middle of an epoch
            control.should_log = control.should_evaluate = False
        control.should_save = control.should_evaluate or self.saved_step != state.global_step

    def leave(self) -> None:
        """Raise [`Stopped`] after a SIGTERM. Call it when the checkpoint is saved."""
        if not self.stopping:
            return
        trainer = self.trainer
        if self.saved_step != trainer.state.global_step:  # "best" saves only a new best model
            trainer._save_checkpoint(trainer.model, trial=None)
        self.stopping = self.asked = False
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        trainer._finish_current_push()
        # A launcher kills the first process 30 seconds after another one has ended
        trainer.accelerator.wait_for_everyone()
        folder = f"checkpoint-{trainer.state.global_step} in {trainer.args.output_dir}"
        first = trainer.is_world_process_zero()
        raise Stopped(f"SIGTERM; saved {folder}, the same command resumes from it." if first else "")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.put_away()

    def put_away(self) -> None:
        """Restore the previous handler, and send a SIGTERM again that no step has seen."""
        if not self.active:
            return
        self.active = False
        if self.before is not None:  # None if it was not set from Python
            signal.signal(signal.SIGTERM, self.before)
        if self.asked:
            self.asked = False
            signal.raise_signal(signal.SIGTERM)

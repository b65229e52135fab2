"""Steps that can be resumed from where several steps train on the same completions (GRPO, RLOO)."""

import math
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hft_trl.errors import HFTError


def check(args: TrainingArguments, checkpoint: str | None) -> None:
    """Reject checkpoints between two generations, whose completions no checkpoint holds."""
    settings = {name: vars(args).get(name, 1) for name in ("steps_per_generation", "num_iterations")}
    passes, accumulated = math.prod(settings.values()), args.gradient_accumulation_steps
    steps = math.lcm(passes, accumulated) // accumulated
    because = (
        f"where {steps} steps train on the same completions ({' x '.join(f'{k} {v}' for k, v in settings.items())}), "
        "and no checkpoint holds these"
    )
    if args.save_strategy == "steps" and args.save_steps >= 1 and args.save_steps % steps:
        raise HFTError(f"save_steps is {args.save_steps:g} {because}: set it to a multiple of {steps}.")
    if checkpoint is not None:
        step = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step
        if step % steps:
            raise HFTError(
                f"{checkpoint} is of step {step} {because}: resume from a checkpoint whose step is a multiple of "
                f"{steps}, or train into another output_dir."
            )

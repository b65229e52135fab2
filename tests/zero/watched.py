"""
Runs recipes and writes down what only their processes can see: `accelerate launch ... watched.py RECIPE FLAGS [+
RECIPE FLAGS]`.

WATCH names a folder for one JSON file per stage and process. With KILL_AT=dpo:3 every process kills itself after step
3 of the DPO stage.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import deepspeed.ops
import torch
from deepspeed.utils import safe_get_full_grad
from transformers import TrainerCallback

sys.path.append(str(Path(__file__).parent.parent))
from leaving import leave

from hft_trl.trainers.mixin import HFTMixin
from hft_trl.weights import is_partitioned, numel

original = HFTMixin.train


class Watch(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer
        self.stage = Path(trainer.args.output_dir).name
        self.facts = {}

    def on_step_begin(self, *args, **kwargs):
        if not self.facts:  # the first step of this process
            self.look()

    def look(self):
        trainer, engine = self.trainer, self.trainer.deepspeed
        step = engine.step
        reference = vars(trainer).get("ref_model")
        self.facts = {
            "num_processes": trainer.accelerator.num_processes,
            "zero_stage": engine.zero_optimization_stage(),
            "digest": trainer.hft_selection.digest,
            "model_hash": vars(trainer).get("_precompute_model_hash"),
            "checkpointing": trainer.args.activation_checkpointing_kwargs,
            "policy": held(trainer.accelerator.unwrap_model(trainer.model)),
            "reference": held(trainer.accelerator.unwrap_model(reference)) if reference is not None else None,
        }

        def watched_step(*args, **kwargs):  # DeepSpeed has reduced the gradients and not yet dropped them
            self.facts["reduced"] = self.reduced()
            step(*args, **kwargs)
            self.facts["optimized"] = self.optimized(engine.optimizer)
            engine.step = step
            rank = trainer.args.process_index
            (Path(os.environ["WATCH"]) / f"{self.stage}-{rank}.json").write_text(json.dumps(self.facts))

        engine.step = watched_step

    def reduced(self):
        """Names of the parameters whose gradients DeepSpeed has reduced."""
        return sorted(n for n, p in self.trainer.model.named_parameters() if safe_get_full_grad(p) is not None)

    def optimized(self, optimizer):
        """Names of the parameters that DeepSpeed's optimizer was made for; it divides these over the processes."""
        groups = optimizer.fp16_groups if self.facts["zero_stage"] == 3 else optimizer.bit16_groups
        held = {id(parameter) for group in groups for parameter in group}
        return sorted(name for name, p in self.trainer.model.named_parameters() if id(p) in held)

    def on_step_end(self, args, state, control, **kwargs):
        if os.environ.get("KILL_AT") == f"{self.stage}:{state.global_step}":
            os.kill(os.getpid(), signal.SIGKILL)


def held(model: torch.nn.Module) -> list[int]:
    """How many elements of a model this process holds, and how many the whole model has."""
    parameters = list(model.parameters())
    own = sum(p.ds_tensor.numel() if is_partitioned(p) else p.numel() for p in parameters)
    return [own, sum(map(numel, parameters))]


def train(self, *args, **kwargs):
    self.add_callback(Watch(self))
    return original(self, *args, **kwargs)


if __name__ == "__main__":
    HFTMixin.train = train
    # Its shared-memory collectives would have to be compiled first; without them gloo does it all
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    words = sys.argv[1:]
    while words:
        end = words.index("+") if "+" in words else len(words)
        sys.argv, words = words[:end], words[end + 1 :]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
    leave()

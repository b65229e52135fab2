"""GEM as the tests train it: a task that contradicts what is kept of earlier ones, in one process or several."""

import os
from pathlib import Path

import conftest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig

from hft_trl import HFTConfig, HFTSFTTrainer
from hft_trl.continual.gem import GEMTrainer
from hft_trl.continual.tasks import Row, encode

QUIET = {
    **conftest.QUIET,
    "learning_rate": 0.3,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


def rows(base: Path, place: str, count: int = 16) -> Dataset:
    """Encoded questions, which another place answers otherwise, some longer than others."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [Row(f"Where does {'A' * (n % 3)}da {n} live?\n", place) for n in range(count)]
    return encode(texts, tokenizer, None)[0]


def trainer(base: Path, folder: Path, memories: list[Dataset] | None, hft=None, **settings) -> HFTSFTTrainer:
    """A trainer of rows that say Rome; without `memories` a plain one."""
    extra = {} if memories is None else {"memories": memories}
    return (HFTSFTTrainer if memories is None else GEMTrainer)(
        model=str(base),
        args=SFTConfig(str(folder), **{**QUIET, **settings}),
        train_dataset=rows(base, "Rome."),
        processing_class=AutoTokenizer.from_pretrained(base),
        hft_config=hft or HFTConfig(),
        **extra,
    )


class Steps(TrainerCallback):
    """Keeps what the optimizer is given in each step, and calls `look` with the model before it is used."""

    def __init__(self, look=None) -> None:
        self.gradients, self.look = [], look

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if self.look is not None:
            self.look(model, state)


def shares(trained: HFTSFTTrainer) -> list[float]:
    return [row["gem_projected_steps"] for row in trained.state.log_history if "gem_projected_steps" in row]


def steps(base: Path, folder: Path, variables: dict[str, str]) -> None:
    """A process of such a training, which leaves its gradients and logged shares in a file named by its rank."""
    os.environ.update(variables)
    processes = int(variables.get("WORLD_SIZE", "1"))
    memories = [rows(base, "Lima.", 3), rows(base, "Oslo, I think.", 1), rows(base, "In Ur.", 9)]
    made = trainer(base, folder, memories, per_device_train_batch_size=4 // processes)
    kept = Steps()
    made.add_callback(kept)
    made.train()
    assert made.accelerator.num_processes == processes
    found = {"gradients": kept.gradients, "shares": shares(made)}
    torch.save(found, folder / f"{made.accelerator.process_index}.pt")

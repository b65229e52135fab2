"""A real step of a real trainer on this CPU, measured: what `hft_trl.planning` has to predict."""

import contextlib

import torch
from datasets import Dataset
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, SFTConfig

from hft_trl import HFTConfig, HFTDPOTrainer, HFTSFTTrainer
from hft_trl.planning.ledger import Ledger
from hft_trl.recipe.measure import peak_memory, reset_peak_memory


class Probe:
    """
    Of the second step, when the optimizer's state is there.

    What the forward pass saves, and what the ledger sees.
    """

    trace = True
    steps = 0

    def training_step(self, *args, **kwargs):
        self.steps += 1
        if self.steps < 2 or not self.trace:
            reset_peak_memory()
            loss = super().training_step(*args, **kwargs)
            self.resident_peak = peak_memory()
            return loss
        models = [self.model, *([self.ref_model] if "ref_model" in vars(self) else [])]
        with Ledger(*models) as ledger:
            loss = super().training_step(*args, **kwargs)
        self.peak, self.operations = sum(ledger.at_peak.values()), ledger.operations
        self.gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        return loss

    def compute_loss(self, *args, **kwargs):
        weights = {p.untyped_storage()._cdata for p in self.model.parameters()}
        kept = {}  # by weak references: a later storage may get the address of a freed one

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks if self.trace else contextlib.nullcontext():
            loss = super().compute_loss(*args, **kwargs)
        self.saved = sum(size for storage, size in kept.values() if not storage.expired())
        return loss


class SFTProbe(Probe, HFTSFTTrainer):
    pass


class DPOProbe(Probe, HFTDPOTrainer):
    pass


def batch(stage: str, rows: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    if padded:
        mask[-1, -1] = 0
    if stage == "sft":
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    return {"input_ids": tokens, "attention_mask": mask, "completion_mask": mask}


def real_step(
    model: str,
    tokenizer: PreTrainedTokenizerFast,
    folder: str,
    stage: str,
    hft: HFTConfig,
    micro_batch: int,
    length: int,
    trace: bool = True,
    **settings,
) -> SFTProbe | DPOProbe:
    """Train two steps, and give the trainer."""
    Config, Trainer = (SFTConfig, SFTProbe) if stage == "sft" else (DPOConfig, DPOProbe)
    args = Config(
        folder, use_cpu=True, max_steps=2, per_device_train_batch_size=micro_batch, max_length=length, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, **{"bf16": False, **settings},
    )  # fmt: skip
    rows = micro_batch * (2 if stage == "dpo" else 1)
    words = (
        {"text": ["Ada lives in Rome."]}
        if stage == "sft"
        else {"prompt": ["Where?"], "chosen": [" Rome"], "rejected": [" Oslo"]}
    )
    dataset = Dataset.from_dict({key: value * 2 * micro_batch for key, value in words.items()})
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=lambda _: batch(stage, rows, length, rows > 1),
        hft_config=hft,
    )
    trainer.trace = trace
    trainer.train()
    return trainer

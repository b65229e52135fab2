"""One step after another of a trainer of each kind, in its own loop, with the seconds and bytes that each takes."""

import argparse
import contextlib
import gc
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hft_trl import HFTConfig, HFTDPOTrainer, HFTSFTTrainer, demo, reference, select
from hft_trl.chat import load_tokenizer
from hft_trl.trainers.optimizer_in_backward import OptimizerInBackward

# The head holds 2 to 5 % as many weights as the layers, as in models of several billion parameters.
SHAPES = {
    "small": {"hidden": 384, "intermediate": 1024, "layers": 8, "heads": 6, "vocab": 1024, "batch": 4, "length": 128},
    "1.5b": {
        "hidden": 2048,
        "intermediate": 5504,
        "layers": 28,
        "heads": 16,
        "vocab": 32000,
        "batch": 4,
        "length": 2048,
    },
    "7b": {
        "hidden": 4096,
        "intermediate": 11008,
        "layers": 32,
        "heads": 32,
        "vocab": 32000,
        "batch": 1,
        "length": 2048,
    },
    "8b": {
        "hidden": 4096,
        "intermediate": 14336,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "vocab": 128256,
        "batch": 1,
        "length": 1024,
    },
}
STAGES = ("sft", "dpo")
VARIANTS = ("fft", "hft", "stock", "lora")
PARTS = ("forward", "backward", "optimizer", "total")
BYTES = ("weight", "reference", "trained", "saved", "gradient", "optimizer", "peak")
WARM_UP, MANY = 2, 10**6
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Setting:
    """
    What one column of steps runs.

    Attributes:
        ratio (`float`): Of `hft` and `stock`.
        micro_batch (`int`, *optional*): Rows of a forward pass, which divide the batch. By default all of it.
        every_n_layers (`int`): Which layers `checkpointing` recomputes: every one, every second, ...
        liger (`bool`): Whether Liger's kernels compute the step.
    """

    stage: str
    variant: str
    checkpointing: bool
    ratio: float = 0.5
    micro_batch: int | None = None
    every_n_layers: int = 1
    liger: bool = False

    def make_trainer(self, options: argparse.Namespace) -> SFTTrainer | DPOTrainer:
        """The stage's trainer, on a model of its own."""
        given, sft, half = start(self, options), self.stage == "sft", HFTConfig(ratio=self.ratio)
        if self.variant == "hft":
            own = HFTConfig(ratio=self.ratio, **options.hft)
            return (HFTSFTTrainer if sft else HFTDPOTrainer)(**given, hft_config=own)
        if self.variant == "lora":
            given["peft_config"] = LoraConfig(**LORA)
        elif not sft:
            given["ref_model"] = build(options)
        if self.variant == "stock":
            select(given["model"], half).apply(given["model"])
        return (SFTTrainer if sft else DPOTrainer)(**given)


def build(options: argparse.Namespace) -> PreTrainedModel:
    """The start model, the same at every call, made on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads or options.heads,
        vocab_size=options.vocab, max_position_embeddings=options.length,
    )  # fmt: skip
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    if (
        "frozen_quantization" in options.hft
    ):  # a quantized half is saved from the start model's files, so it needs some
        model.save_pretrained(Path(options.folder) / "start")
        model.config._name_or_path = str(Path(options.folder) / "start")
    return model


def start(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """What every trainer of the stage is given."""
    cpu, ours, sft = options.device == "cpu", setting.variant == "hft", setting.stage == "sft"
    rows, layers = setting.micro_batch or options.batch, {"every_n_layers": setting.every_n_layers}
    args = (SFTConfig if sft else DPOConfig)(
        options.folder, use_cpu=cpu, bf16=not cpu, per_device_train_batch_size=rows,
        gradient_accumulation_steps=options.batch // rows, max_length=options.length,
        max_steps=MANY, lr_scheduler_type="constant", report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, gradient_checkpointing=setting.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False, **(layers if setting.every_n_layers > 1 else {})},
        use_liger_kernel=setting.liger,
        # What a recipe adds to a step beside the trainer itself
        optim=options.optim, max_grad_norm=0 if ours and options.hft.get("optimizer_in_backward") else 1,
        enable_jit_checkpoint=ours, include_num_input_tokens_seen="non_padding" if ours else "no",
    )  # fmt: skip
    row = {"text": "a"} if sft else {"prompt": "a", "chosen": "b", "rejected": "c"}  # the batches are not made of it
    given: dict[str, Any] = {"model": build(options), "args": args, "train_dataset": Dataset.from_list([row])}
    given["processing_class"] = load_tokenizer(str(demo.MODEL))
    return given


def examples(setting: Setting, options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Return a batch of random tokens, always the same. The first half of a pair is the prompt."""
    rng = random.Random(0)
    draw = [[rng.randrange(options.vocab) for _ in range(options.length)] for _ in range(2 * options.batch)]
    if setting.stage == "sft":
        return [{"input_ids": ids} for ids in draw[: options.batch]]
    cut = options.length // 2
    pairs = zip(draw[: options.batch], draw[options.batch :], strict=True)
    return [{"prompt_ids": a[:cut], "chosen_ids": a[cut:], "rejected_ids": b[cut:]} for a, b in pairs]


class Ready(Exception):
    """Raised where a trainer would begin its first epoch."""


class Run:
    """A trainer that has begun to train, ready for one step after another."""

    def __init__(self, setting: Setting, options: argparse.Namespace) -> None:
        gc.collect()  # a trainer that is not used any more holds itself
        self.cuda = options.device == "cuda"
        if self.cuda:
            torch.cuda.empty_cache()
        handler = signal.getsignal(signal.SIGTERM)
        self.trainer = trainer = setting.make_trainer(options)
        # The handler of `enable_jit_checkpoint` holds its trainer for as long as the process lives
        signal.signal(signal.SIGTERM, handler)
        self.steps: list[dict[str, float]] = []
        self.losses: list[torch.Tensor] = []
        rows, size = examples(setting, options), trainer.args.per_device_train_batch_size
        batches = [trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]
        self.epoch = {"train_dataloader": batches, "steps_in_epoch": len(batches), "num_update_steps_per_epoch": 1}
        trainer._run_epoch = self._begin  # `train` prepares everything, and this takes over where its epochs begin
        with contextlib.suppress(Ready):
            trainer.train()
        del trainer._run_epoch
        if setting.variant == "hft" and options.hft.get("optimizer_in_backward"):  # `train` has ended it
            OptimizerInBackward().training_begins(trainer)
        trainer.control = trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        trainer.compute_loss = self._timed("forward", trainer.compute_loss)
        trainer.accelerator.backward = self._timed("backward", trainer.accelerator.backward)
        for _ in range(WARM_UP):
            self.step()
        self.steps.clear()

    def _begin(self, **arguments: Any) -> None:
        self.epoch = {**arguments, **self.epoch}
        raise Ready

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _timed(self, part: str, method: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
        def timed(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            start = self._now()
            result = method(*args, **kwargs)
            self.spent[part] += self._now() - start
            if part == "forward":
                self.losses.append(result.detach())
            return result

        return timed

    def step(self) -> None:
        """
        Train one epoch of one batch in the trainer's own loop.

        What is neither forward nor backward counts as the optimizer's.
        """
        self.spent = dict.fromkeys(PARTS, 0.0)
        start = self._now()
        self.trainer._run_epoch(**self.epoch)
        self.spent["total"] = self._now() - start
        self.spent["optimizer"] = self.spent["total"] - self.spent["forward"] - self.spent["backward"]
        self.steps.append(dict(self.spent))

    def sizes(self) -> dict[str, int]:
        """
        Bytes of what a step needs, by a forward and backward pass that changes nothing.

        `saved` is what the forward pass keeps for the backward pass, parameters left out, each storage once.
        """
        trainer, model = self.trainer, self.epoch["model"]
        parameters = list(model.parameters())
        weights, kept = {p.untyped_storage().data_ptr() for p in parameters}, {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        inputs = trainer._prepare_inputs(self.epoch["train_dataloader"][0])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs)
            saved = sum(kept.values())
        trainer.accelerator.backward(loss)
        state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
        own, trained = vars(trainer).get("ref_model"), [p for p in parameters if p.requires_grad]
        sizes = {
            "weight": sum(p.nbytes for p in parameters),
            "reference": reference.memory(trainer.accelerator.unwrap_model(model), own)[0] if own else 0,
            "trained": sum(p.nbytes for p in trained),
            "saved": saved,
            "gradient": sum(p.grad.nbytes for p in trained if p.grad is not None),
            "optimizer": sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
            "trained_tensors": len(trained),
        }
        model.zero_grad()
        return sizes

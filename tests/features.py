"""
Features of TRL and transformers, each trained for two steps with a half, and what shows that it was active.

As a program it trains all of them, one after the other: `accelerate launch ... features.py BASE OUTPUT [NAME ...]`.
"""

import gc
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from torch._dynamo.utils import counters
from trl import DatasetMixtureConfig, DPOConfig, SFTConfig
from trl.chat_template_utils import qwen3_training_chat_template
from trl.scripts.utils import DatasetConfig

sys.path.extend(str(Path(__file__).parent / folder) for folder in ("processes", "trainers"))

from conftest import tulu_row, ultrafeedback_row
from leaving import leave
from test_trl_features import DPO, MATRICES, SFT, conversation_with_a_tool
from training import QUIET, ResumableDPOTrainer, ResumableSFTTrainer, weights

from hft_trl import HFTConfig, demo
from hft_trl.chat import load_tokenizer
from hft_trl.recipe.loading import load_mixture
from hft_trl.recipe.rows import preference_dataset, sft_dataset
from hft_trl.weights import fingerprint

ROWS = 32
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
# The metric is turned round: the first checkpoint is the best, so the weights have to go back
WORST = {**EVALUATED, "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
COMMON = {
    "plain": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "activation_offloading": {"activation_offloading": True},
    "nf4": {"hft": HFTConfig(frozen_quantization="nf4")},
    "load_best_model_at_end": WORST,
    "save_only_model": {"save_strategy": "steps", "save_steps": 1, "save_only_model": True},
    "bf16_full_eval": {"bf16_full_eval": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
}
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        **COMMON,
        **{name: SFT[name] for name in ("packing, bfd", "packing, bfd_split", "packing, wrapped", "loss_type dft")},
        "int8": {"hft": HFTConfig(frozen_quantization="int8")},
        "padding_free": {"padding_free": True, "max_length": None},
        "8 bit": {"optim": "adamw_bnb_8bit"},
        **{name: SFT[name] for name in ("adafactor", "lion", "ademamix", "galore", "apollo")},
        **{name: SFT[name] for name in ("neftune", "tool calls", "streaming")},
        "muon": {"hft": MATRICES, "given": {"optimizer_cls_and_kwargs": (torch.optim.Muon, {"lr": 1e-2})}},
        "mixture": {},
    },
    "dpo": {
        **COMMON,
        **{
            name: DPO[name][0]
            for name in (
                *("sigmoid_norm", "ipo", "apo_zero", "robust, label_smoothing", "exo_pair, label_smoothing"),
                *("several losses", "padding_free"),
            )
        },
        "precompute_ref_log_probs": {"precompute_ref_log_probs": True},
        "sync_ref_model": MOVING,
        "sync_ref_model, saved": {**MOVING, "save_strategy": "steps", "save_steps": 1},
    },
}
BACKENDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "zero2", "zero3": "zero3"}
"""What a launch calls itself in a process."""
NOWHERE = {
    "activation_offloading": "activation_offloading is true, .* no GPU is available: set it to false",
    "bf16_full_eval": "bf16_full_eval is true, .* set it to false",
}
SHARDED = {
    **NOWHERE,
    **dict.fromkeys(("int8", "nf4"), "hft.frozen_quantization is '.*', but .* cannot shard .*: leave it out"),
    "sync_ref_model, saved": "sync_ref_model is true, .* no checkpoint holds it, .*: set save_strategy to 'no'",
}
MATRICES_ONLY = dict.fromkeys(
    ("galore", "apollo", "muon"), ".* needs? matrices, and DeepSpeed makes vectors of them: set"
)
REJECTED = {
    "ddp": NOWHERE,
    "fsdp2": {
        **SHARDED,
        **dict.fromkeys(("8 bit", "adafactor", "lion", "ademamix", "apollo"), "optim is .* FSDP2 shards: set it to"),
    },
    "zero2": {**SHARDED, **MATRICES_ONLY},
    "zero3": {**SHARDED, **MATRICES_ONLY},
}
"""The errors of features that a launch rejects."""
FAILS = {"zero3": {"torch_compile": "RuntimeError: The size of tensor a (0) must match the size of tensor b"}}
"""What a launch does not do, with method fft either, as no setting of ours could help."""
EVERY = [(stage, name) for stage, features in FEATURES.items() for name in features]


class Watched:
    """Keeps the sizes of the first batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if "sizes" not in vars(self):
            self.sizes = {name: list(value.shape) for name, value in inputs.items() if torch.is_tensor(value)}
        return super().compute_loss(model, inputs, *args, **kwargs)


class WatchedSFT(Watched, ResumableSFTTrainer):
    pass


class WatchedDPO(Watched, ResumableDPOTrainer):
    pass


def train(stage: str, name: str, base: Path, folder: Path) -> dict[str, Any]:
    """Train one feature, save, and tell what this process saw."""
    settings = dict(FEATURES[stage][name])
    hft, given = settings.pop("hft", HFTConfig()), settings.pop("given", {})
    tokenizer = load_tokenizer(str(base), "tulu")
    if name == "tool calls":
        tokenizer.chat_template = qwen3_training_chat_template
        rows = sft_dataset(Dataset.from_list([conversation_with_a_tool(number) for number in range(8)]), "rows")
    elif name == "mixture":
        parts = [DatasetConfig(path=str(demo.SFT_DATA), split=split) for split in ("train[:16]", "train[16:24]")]
        rows = sft_dataset(load_mixture(DatasetMixtureConfig(datasets=parts), "train"), "rows")
    elif stage == "sft":
        rows = sft_dataset(Dataset.from_list([tulu_row(number) for number in range(ROWS)]), "rows")
    else:
        rows = preference_dataset(Dataset.from_list([ultrafeedback_row(number) for number in range(ROWS)]), "rows")
    config, kind = (SFTConfig, WatchedSFT) if stage == "sft" else (DPOConfig, WatchedDPO)
    quiet = {**QUIET, "max_steps": 2, **({"assistant_only_loss": True} if stage == "sft" else {})}
    args = config(str(folder), **{**quiet, **settings})
    trainer = kind(
        model=str(base),
        args=args,
        train_dataset=rows.to_iterable_dataset() if name == "streaming" else rows,
        eval_dataset=rows.select(range(8)) if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        hft_config=hft,
        **given,
    )
    calls = []
    if not args.torch_compile:
        trainer.model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(None))
    counters.clear()
    trainer.train()
    in_training = len(calls)
    log = trainer.state.log_history
    after = trainer.evaluate()["eval_loss"] if args.load_best_model_at_end else None
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # only the first process writes
    before, saved = weights(base), weights(folder)
    optimizer = trainer.optimizer
    while "optimizer" in vars(optimizer):  # accelerate's and DeepSpeed's are around it
        optimizer = optimizer.optimizer
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    plugin = trainer.accelerator.state.deepspeed_plugin
    streamed = not isinstance(trainer.train_dataset, Dataset)
    return {
        "processes": trainer.accelerator.num_processes,
        "backend": f"zero{plugin.zero_stage}" if plugin else trainer.accelerator.distributed_type.value,
        "digest": trainer.hft_selection.digest,
        "losses": [row["loss"] for row in log if "loss" in row],
        "trainable": sorted(trainer.hft_selection.trainable),
        "moved": sorted(key for key in saved if fingerprint(saved[key]) != fingerprint(before[key])),
        "frozen": len(trainer.hft_selection.frozen),
        "whole": before.keys() == saved.keys(),
        "sizes": trainer.sizes,
        "rows": None if streamed else len(trainer.train_dataset),
        "text": None if streamed else tokenizer.decode(trainer.train_dataset[0].get("input_ids", [])),
        "calls": in_training,
        "graphs": counters["frames"]["ok"],
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "state": sorted({str(value.dtype if torch.is_tensor(value) else type(value).__name__) for value in state}),
        "evaluated": [row["eval_loss"] for row in log if "eval_loss" in row],
        "after": after,
        "files": sorted(path.name for path in folder.glob("checkpoint-2/*")),
        "reference": vars(trainer).get("ref_model") is not None,
    }


# What shows that a feature was active, in the plain training's light
ACTIVE: dict[str, Callable[[dict, dict], bool]] = {
    "gradient_checkpointing": lambda seen, plain: seen["calls"] == 2 * plain["calls"] > 0,
    "packing, bfd": lambda seen, _: seen["rows"] < ROWS and seen["sizes"]["input_ids"][0] == 1,
    "packing, bfd_split": lambda seen, _: seen["rows"] > ROWS and seen["sizes"]["input_ids"][0] == 1,
    "packing, wrapped": lambda seen, _: seen["rows"] < ROWS and seen["sizes"]["input_ids"] == [4, 64],
    "sft padding_free": lambda seen, plain: seen["sizes"]["input_ids"][0] == 1 < plain["sizes"]["input_ids"][0],
    # TRL 1.16 warns, and pads
    "dpo padding_free": lambda seen, plain: seen["sizes"] == plain["sizes"],
    "loss_type dft": lambda seen, plain: seen["losses"][0] != pytest.approx(plain["losses"][0], rel=1e-3),
    "neftune": lambda seen, plain: seen["losses"][0] != pytest.approx(plain["losses"][0], rel=1e-5),
    "8 bit": lambda seen, _: "torch.uint8" in seen["state"],
    "adafactor": lambda seen, _: seen["optimizer"].endswith("optimization.Adafactor"),
    "lion": lambda seen, _: seen["optimizer"].endswith("lion.Lion"),
    "ademamix": lambda seen, _: seen["optimizer"].endswith("ademamix.AdEMAMix"),
    "muon": lambda seen, _: seen["optimizer"] == "torch.optim.Muon",
    "galore": lambda seen, _: "GaLoreProjector" in seen["state"],
    "apollo": lambda seen, _: "GradientProjector" in seen["state"],
    "tool calls": lambda seen, _: all(word in seen["text"] for word in ("look", "person", "city 0")),
    "mixture": lambda seen, _: seen["rows"] == 16 + 8,
    "streaming": lambda seen, _: seen["rows"] is None,
    "load_best_model_at_end": lambda seen, _: (
        seen["evaluated"][0] > 1.001 * seen["evaluated"][1]
        and seen["after"] == pytest.approx(seen["evaluated"][0], rel=1e-5)
    ),
    "save_only_model": lambda seen, _: not any("optim" in name or "global_step" in name for name in seen["files"]),
    "torch_compile": lambda seen, plain: seen["graphs"] > 0 == plain["graphs"],
    "several losses": lambda seen, _: seen["losses"][0] > math.log(2) + 0.1,
    "precompute_ref_log_probs": lambda seen, plain: plain["reference"] and not seen["reference"],
    "sync_ref_model, saved": lambda seen, _: "reference.safetensors" in seen["files"],
    # The reference is the policy again after each step
    "sync_ref_model": lambda seen, plain: (
        seen["losses"][1] == pytest.approx(math.log(2), rel=1e-5) != pytest.approx(plain["losses"][1], rel=1e-5)
    ),
}
FIRST = {name: first for name, (_, first) in DPO.items() if first is not None}
"""The loss of DPO's first step, where policy and reference are the same."""


def check(launch: str, ranks: list[dict[str, dict]], stage: str, name: str) -> None:
    """
    Assert what the matrix promises of a feature in a launch, or that it was rejected, or fails as the matrix says.

    Training ended with finite losses in every process, which drew one half, the feature was active, every trained
    parameter moved, and every frozen one has the bits of the base in the saved model.
    """
    key = f"{stage} {name}"
    if name in REJECTED[launch]:
        for rank in ranks:
            assert re.fullmatch(f"HFTError: {REJECTED[launch][name]}.*", rank[key]["error"])
        return
    if name in FAILS.get(launch, {}):
        assert all(rank[key]["error"].startswith(FAILS[launch][name]) for rank in ranks)
        return
    assert [rank[key].get("error") for rank in ranks] == [None, None]
    assert [(rank[key]["processes"], rank[key]["backend"]) for rank in ranks] == [(2, BACKENDS[launch])] * 2
    assert len({rank[key]["digest"] for rank in ranks}) == 1
    for seen, plain in ((rank[key], rank[f"{stage} plain"]) for rank in ranks):
        assert len(seen["losses"]) == 2
        assert all(map(math.isfinite, seen["losses"]))
        assert seen["moved"] == seen["trainable"]
        assert seen["frozen"] > 10
        assert seen["whole"]
        active = ACTIVE.get(key, ACTIVE.get(name))
        assert active is None or active(seen, plain), seen
        if stage == "dpo" and name in FIRST:
            assert seen["losses"][0] == pytest.approx(FIRST[name], rel=1e-5)


def seen(output: Path) -> list[dict[str, dict]]:
    """What the processes of a launch saw, in the order of their ranks."""
    return [json.loads((output / f"seen-{rank}.json").read_text()) for rank in range(2)]


def main(base: str, output: str, *names: str) -> None:
    torch.set_num_threads(1)
    rank, found = int(os.environ["RANK"]), {}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see zero/watched.py
    else:
        import fsdp_on_cpu

        fsdp_on_cpu.enable()
    for stage, name in EVERY:
        if names and name not in names:
            continue
        key = f"{stage} {name}"
        try:
            found[key] = train(stage, name, Path(base), Path(output) / key)
        except Exception as error:
            found[key] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        PartialState().wait_for_everyone()
        torch.compiler.reset()
        gc.collect()
        (Path(output) / f"seen-{rank}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()

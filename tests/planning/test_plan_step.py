"""A step that is traced without weights is the step that a trainer runs: its bytes, its operations and its peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE
from steps import real_step
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hft_trl import HFTConfig, HFTError, select
from hft_trl.planning.memory import LAYOUTS, Storage, at_peak, held, sizes
from hft_trl.planning.trace import StepSettings, trace_step
from hft_trl.reference import memory
from hft_trl.skeleton import build_on_meta

TESTS = Path(__file__).parents[1]
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(vocab_size=1000, num_key_value_heads=2, **SMALL),
    "qwen3": Qwen3Config(vocab_size=1000, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, **SMALL),
    "mixture": Qwen3MoeConfig(
        vocab_size=1000, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, head_dim=16, **SMALL
    ),
    "gemma2": Gemma2Config(vocab_size=1000, num_key_value_heads=2, head_dim=16, **SMALL),  # its logits are capped
    "gpt2": GPT2Config(vocab_size=1000, n_embd=64, n_layer=3, n_head=4, resid_pdrop=0.1, attn_pdrop=0, embd_pdrop=0),
}
# Each value of each setting, with each of the others at least once
CASES = [
    ("llama", "sft", "fft", 0, False, 2),
    ("llama", "sft", "hft", 0, False, 2),
    ("llama", "sft", "hft", 2, True, 1),
    ("llama", "dpo", "hft", 0, True, 1),
    ("llama", "dpo", "fft", 1, False, 2),
    ("qwen3", "sft", "hft", 1, True, 2),
    ("qwen3", "sft", "fft", 0, True, 2),
    ("qwen3", "dpo", "hft", 1, False, 1),
    ("gemma2", "sft", "hft", 0, True, 2),
    ("gpt2", "sft", "hft", 0, False, 2),
    ("gpt2", "sft", "hft", 1, True, 1),
    ("gpt2", "dpo", "fft", 0, True, 1),
    ("mixture", "sft", "hft", 0, True, 2),
    ("mixture", "dpo", "hft", 1, False, 1),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Models of every shape, with a tokenizer."""
    root = tmp_path_factory.mktemp("shapes")
    for name, config in SHAPES.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return root


@pytest.mark.parametrize(("shape", "stage", "method", "checkpointed", "bf16", "rows"), CASES)
def test_every_part_is_what_a_trainer_has(
    folders, tokenizer, tmp_path, shape, stage, method, checkpointed, bf16, rows
):
    """
    Weights, gradients, reference and optimizer state to the byte; what is kept for backward and the peak but for
    scalars.
    """
    hft = HFTConfig(method=method)
    checkpointing = {"gradient_checkpointing": checkpointed > 0}
    if checkpointed > 1:
        checkpointing["gradient_checkpointing_kwargs"] = {"every_n_layers": checkpointed}
    trainer = real_step(
        str(folders / shape), tokenizer, str(tmp_path), stage, hft, rows, 96, bf16=bf16, **checkpointing
    )

    skeleton = build_on_meta(str(folders / shape))
    selection = select(skeleton, hft)
    settings = StepSettings(stage, rows, 96, checkpointed=checkpointed, autocast=bf16, device="cpu")
    step = trace_step(skeleton, selection, settings)
    parts = held(sizes(skeleton, selection), LAYOUTS["single"], 1, Storage(), stage == "dpo", method == "hft")

    model = trainer.model
    assert parts["weights_trainable"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert parts["weights_frozen"] == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert parts["gradients"] == trainer.gradients
    assert parts["optimizer"] == _bytes(trainer.optimizer)
    assert parts["reference"] == (memory(model, trainer.ref_model)[0] if stage == "dpo" else 0)
    assert step.operations == trainer.operations
    assert step.saved == pytest.approx(trainer.saved, abs=1_000)
    assert sum(step.at_peak.values()) == pytest.approx(trainer.peak, rel=0.001)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_frozen_half_in_bfloat16_is_held_and_computed_with_as_such(folders, tokenizer, tmp_path, stage):
    """Half the bytes, no copies of it, and the same in the reference that shares it."""
    hft = HFTConfig(frozen_dtype="bfloat16")
    trainer = real_step(
        str(folders / "llama"), tokenizer, str(tmp_path), stage, hft, 1, 96, bf16=True, gradient_checkpointing=False
    )
    skeleton = build_on_meta(str(folders / "llama"))
    selection = select(skeleton, hft)
    step = trace_step(skeleton, selection, StepSettings(stage, 1, 96, frozen_dtype=torch.bfloat16, device="cpu"))
    storage = Storage(frozen_dtype="bfloat16")
    parts = held(sizes(skeleton, selection), LAYOUTS["single"], 1, storage, stage == "dpo")
    assert parts["weights_frozen"] == sum(p.nbytes for p in trainer.model.parameters() if not p.requires_grad)
    assert parts["reference"] == (memory(trainer.model, trainer.ref_model)[0] if stage == "dpo" else 0)
    assert step.saved == pytest.approx(trainer.saved, abs=1_000)
    assert sum(step.at_peak.values()) == pytest.approx(trainer.peak, rel=0.001)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_quantized_frozen_half_and_updates_inside_the_backward_pass_are_counted(
    folders, tokenizer, tmp_path, stage, kind
):
    """
    The packed bytes with their scales, the matrices that are made whole for a moment, and one gradient at a time.
    """
    hft = HFTConfig(frozen_quantization=kind, optimizer_in_backward=True)
    trainer = real_step(
        *(str(folders / "llama"), tokenizer, str(tmp_path), stage, hft, 1, 96),
        **{"bf16": True, "gradient_checkpointing": False, "max_grad_norm": 0},
    )
    skeleton = build_on_meta(str(folders / "llama"))
    selection = select(skeleton, hft)
    settings = StepSettings(stage, 1, 96, device="cpu", frozen_quantization=kind, optimizer_in_backward=True)
    step = trace_step(skeleton, selection, settings)
    storage = Storage(frozen_quantization=kind, optimizer_in_backward=True)
    parts = held(sizes(skeleton, selection), LAYOUTS["single"], 1, storage, stage == "dpo")
    frozen = sum(p.nbytes for p in trainer.model.parameters() if not p.requires_grad)
    assert parts["weights_frozen"] == frozen
    assert parts["gradients"] == max(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert parts["reference"] == (memory(trainer.model, trainer.ref_model)[0] if stage == "dpo" else 0)
    assert trainer.gradients == 0
    assert step.operations == trainer.operations
    assert step.saved == pytest.approx(trainer.saved, abs=1_000)
    assert sum(step.at_peak.values()) == pytest.approx(trainer.peak, rel=0.001)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit"])
def test_the_state_of_other_optimizers_is_known_too(folders, tokenizer, tmp_path, optim):
    """bitsandbytes' tables of code words, one for all tensors, are left out."""
    trainer = real_step(str(folders / "qwen3"), tokenizer, str(tmp_path), "sft", HFTConfig(), 1, 16, optim=optim)
    skeleton = build_on_meta(str(folders / "qwen3"))
    parts = held(sizes(skeleton, select(skeleton, HFTConfig())), LAYOUTS["single"], 1, Storage(optim=optim), False)
    assert parts["optimizer"] == _bytes(trainer.optimizer)


def test_the_resident_set_of_a_step_is_predicted_within_a_tenth(tmp_path, tokenizer):
    """FFT and HFT, SFT and DPO, with and without checkpointing, in processes that give back what they free."""
    requests = [
        {"stage": "sft", "method": "fft", "checkpointed": 0, "micro_batch": 2, "length": 128},
        {"stage": "dpo", "method": "hft", "checkpointed": 0, "micro_batch": 1, "length": 128},
        {"stage": "sft", "method": "hft", "checkpointed": 1, "micro_batch": 2, "length": 128},
    ]
    # As many words as a tile of logits is wide: memory of a tile that is never written to is not resident.
    config = LlamaConfig(
        vocab_size=32768, **{**SMALL, "hidden_size": 128, "num_hidden_layers": 12}, tie_word_embeddings=True
    )
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    for folder, shape in ((small, SHAPES["llama"]), (large, config)):
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    job = {"small": small, "large": large, "folder": str(tmp_path / "out"), "requests": requests}
    gives_back = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    command = [sys.executable, str(TESTS / "peak_of_a_step.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **gives_back})
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    for request, peak in zip(requests, measured, strict=True):
        hft = HFTConfig(method=request.pop("method"))
        skeleton = build_on_meta(large)
        selection = select(skeleton, hft)
        step = trace_step(skeleton, selection, StepSettings(**request, autocast=False, device="cpu"))
        layout, dpo = LAYOUTS["single"], request["stage"] == "dpo"
        parts = held(sizes(skeleton, selection), layout, 1, Storage(), dpo, hft.method == "hft")
        predicted = sum(at_peak(parts, step, layout, accumulates=False).values())
        assert 100e6 < predicted < 600e6
        assert predicted == pytest.approx(peak, rel=0.1), (request, parts, step)


def test_a_gpu_s_tiles_cost_the_same_products_and_less_memory(folders):
    """
    The stand-in for TRL's Triton kernels does the products of TRL's own function and keeps the same for backward.
    """
    skeleton = build_on_meta(str(folders / "llama"))
    selection = select(skeleton, HFTConfig())
    cpu, cuda = (
        trace_step(skeleton, selection, StepSettings("sft", 2, 96, device=device)) for device in ("cpu", "cuda")
    )
    assert cuda.operations == cpu.operations
    assert cuda.saved == cpu.saved
    assert sum(cuda.at_peak.values()) < sum(cpu.at_peak.values())


def test_the_frozen_half_spares_its_weight_gradients_only(folders):
    """A step computes less by exactly the gradients of the frozen matrices: a third of their share."""
    skeleton = build_on_meta(str(folders / "llama"))
    steps = {
        m: trace_step(skeleton, select(skeleton, HFTConfig(method=m)), StepSettings("sft", 2, 96))
        for m in ("fft", "hft")
    }
    frozen = set(select(skeleton, HFTConfig()).frozen)
    matrices = sum(p.numel() for name, p in skeleton.named_parameters() if name in frozen and p.dim() == 2)
    assert steps["fft"].operations - steps["hft"].operations == 2 * 2 * 96 * matrices


def test_the_model_stays_as_it_was(folders):
    """Tracing changes neither the skeleton's parameters nor what of them learns."""
    skeleton = build_on_meta(str(folders / "llama"))
    before = {name: (p.shape, p.requires_grad, p.device.type) for name, p in skeleton.named_parameters()}
    trace_step(skeleton, select(skeleton, HFTConfig()), StepSettings("dpo", 1, 16, checkpointed=1))
    assert {name: (p.shape, p.requires_grad, p.device.type) for name, p in skeleton.named_parameters()} == before


def test_code_that_needs_numbers_is_an_error_that_names_the_model(folders, monkeypatch):
    """A model that decides by its weights cannot be traced."""
    skeleton = build_on_meta(str(folders / "llama"))
    mlp = type(skeleton.model.layers[0].mlp)
    monkeypatch.setattr(mlp, "forward", lambda self, x: x if x.sum() > 0 else -x)
    with pytest.raises(HFTError, match="LlamaForCausalLM cannot be traced without weights"):
        trace_step(skeleton, select(skeleton, HFTConfig()), StepSettings("sft", 1, 16))


def _bytes(optimizer):
    entries = (
        value for state in optimizer.state.values() for name, value in state.items() if not name.startswith("qmap")
    )
    return sum(value.nbytes for value in entries if hasattr(value, "nbytes"))

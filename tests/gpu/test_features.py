"""Each setting trains and saves on a GPU, and promises of equal bits hold there. The bodies run on a CPU as well."""

import json
import math
from functools import cache

import pytest
import torch
from devices import GPU, ON_A_GPU, in_own_process, kept, log, needs_flash, needs_liger, on, on_each_device
from training import dpo_trainer, losses, sft_trainer, weights
from trl import DPOTrainer, SFTTrainer

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTSFTTrainer
from hft_trl.weights import fingerprint

KINDS = {"sft": (sft_trainer, HFTSFTTrainer, SFTTrainer), "dpo": (dpo_trainer, HFTDPOTrainer, DPOTrainer)}
# Name: stage, settings of HFT (`None`: TRL's own trainer), arguments of the trainer
IN_8_BIT = {"optim": "adamw_bnb_8bit"}
RUNS = {
    "sft": ("sft", {}, {}),
    "sft again": ("sft", {}, {}),
    "dpo": ("dpo", {}, {}),
    "sft, stock TRL": ("sft", None, {}),
    "sft, method fft": ("sft", {"method": "fft"}, {}),
    "dpo, stock TRL": ("dpo", None, {}),
    "dpo, method fft": ("dpo", {"method": "fft"}, {}),
    "sft, frozen_dtype": ("sft", {"frozen_dtype": "bfloat16"}, {}),
    "dpo, frozen_dtype": ("dpo", {"frozen_dtype": "bfloat16"}, {}),
    "sft, nf4": ("sft", {"frozen_quantization": "nf4"}, {}),
    "sft, int8": ("sft", {"frozen_quantization": "int8"}, {}),
    "dpo, nf4": ("dpo", {"frozen_quantization": "nf4"}, {}),
    "sft, in backward": ("sft", {"optimizer_in_backward": True}, {"max_grad_norm": 0}),
    "sft, not in backward": ("sft", {}, {"max_grad_norm": 0}),
    "sft, 8 bit": ("sft", {}, IN_8_BIT),
    "sft, 8 bit, in backward": ("sft", {"optimizer_in_backward": True}, {**IN_8_BIT, "max_grad_norm": 0}),
    "sft, element": ("sft", {"strategy": "element"}, {}),
    "dpo, element, evaluated": (
        "dpo",
        {"strategy": "element"},
        {"eval_rows": 8, "eval_strategy": "steps", "eval_steps": 2},
    ),
    "sft, gradient_norm": ("sft", {"strategy": "importance", "importance": "gradient_norm"}, {}),
    "sft, weight_norm": ("sft", {"strategy": "importance", "importance": "weight_norm"}, {}),
    "sft, checkpointing": ("sft", {}, {"gradient_checkpointing": True}),
    "sft, every second layer": (
        "sft",
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}},
    ),
    "sft, reentrant": (
        "sft",
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "sft, packing": ("sft", {}, {"packing": True, "max_length": 64}),
    "dpo, precomputed": ("dpo", {}, {"precompute_ref_log_probs": True}),
}
# Named in docs/memory.md
EQUAL = [
    ("sft", "sft again"),
    ("sft, stock TRL", "sft, method fft"),
    ("dpo, stock TRL", "dpo, method fft"),
    ("sft", "sft, frozen_dtype"),
    ("dpo", "dpo, frozen_dtype"),
    ("sft, not in backward", "sft, in backward"),
    ("sft", "sft, checkpointing"),
    ("sft", "sft, every second layer"),
    ("sft", "sft, reentrant"),
]


@pytest.fixture(scope="module")
def run(base, tulu, ultrafeedback, tmp_path_factory):
    """Train, save, and return losses, saved weights and the selection. Equal calls train once."""

    @cache
    def once(device: str, name: str):
        stage, hft, settings = RUNS[name]
        return train(device, stage, hft, **settings)

    def train(device: str, stage: str, hft: dict | None, **settings):
        make, ours, stock = KINDS[stage]
        rows, folder = tulu if stage == "sft" else ultrafeedback, tmp_path_factory.mktemp("run")
        kind, config = (ours, HFTConfig(**hft)) if hft is not None else (stock, None)
        trainer = make(kind, base, rows, folder, config, **{**on(device), **settings})
        trainer.train()
        trainer.save_model()
        assert trainer.model.device.type == device
        return losses(trainer), weights(folder), trainer.hft_selection if config else None

    once.train = train
    return once


def check(result, base) -> None:
    """All losses are finite, the frozen half has its bits, and something learned."""
    values, saved, selection = result
    assert len(values) == 4
    assert all(math.isfinite(value) for value in values)
    start = weights(base)
    moved = {name for name, tensor in saved.items() if fingerprint(tensor) != fingerprint(start[name])}
    assert saved.keys() == start.keys()
    assert moved
    if selection is not None:
        assert not moved & set(selection.frozen)


@on_each_device
@pytest.mark.parametrize("name", RUNS)
def test_each_setting_trains_saves_and_keeps_the_frozen_half(run, base, device, name):
    check(run(device, name), base)


@on_each_device
@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_bits_are_equal_where_it_is_promised(run, device, one, other):
    (some, saved, _), (others, theirs, _) = run(device, one), run(device, other)
    assert some == others
    assert {name: fingerprint(tensor) for name, tensor in saved.items()} == {
        name: fingerprint(tensor) for name, tensor in theirs.items()
    }


@on_each_device
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_compiled_model_trains_as_an_eager_one(run, base, device, stage):
    """On a GPU by Inductor, whose kernels round otherwise. On a CPU no compiler of C++ is asked for."""
    backend = "inductor" if device == "cuda" else "eager"
    found = run.train(device, stage, {}, torch_compile=True, torch_compile_backend=backend)
    check(found, base)
    assert found[0] == pytest.approx(run(device, stage)[0], rel=0.05)
    torch.compiler.reset()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("device", [GPU])
@needs_liger
def test_liger_trains_as_trls_own_loss(run, base, device, stage):
    found = run.train(device, stage, {}, use_liger_kernel=True)
    check(found, base)
    assert found[0] == pytest.approx(run(device, stage)[0], rel=0.05)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("device", [GPU])
def test_activations_in_main_memory_train_as_those_on_the_gpu(run, base, device, stage):
    found = run.train(device, stage, {}, activation_offloading=True)
    check(found, base)
    assert found[0] == pytest.approx(run(device, stage)[0], rel=0.05)


@on_each_device
def test_rows_without_padding_have_the_losses_of_padded_ones(run, base, device):
    found = run.train(device, "sft", {}, padding_free=True, max_length=None)
    check(found, base)
    assert found[0] == pytest.approx(run(device, "sft")[0], rel=0.05)


@pytest.mark.parametrize("settings", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}])
@pytest.mark.parametrize("device", [GPU])
@needs_flash
def test_flash_attention_takes_rows_without_padding(run, base, device, settings):
    init = {"dtype": "float32", "attn_implementation": "flash_attention_2"}
    check(run.train(device, "sft", {}, model_init_kwargs=init, **settings), base)


@on_each_device
def test_an_evaluation_in_bfloat16_is_rejected_with_a_half_and_works_without(base, ultrafeedback, tmp_path, device):
    settings = {**on(device), "eval_rows": 8, "bf16_full_eval": True}
    with pytest.raises(HFTError, match="bf16_full_eval is true"):
        dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path, **settings)
    trainer = dpo_trainer(HFTDPOTrainer, base, ultrafeedback, tmp_path, HFTConfig(method="fft"), **settings)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@on_each_device
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_killed_run_ends_in_the_bytes_of_a_whole_one(base, tmp_path, device, stage):
    """With full_determinism, also in the state of the optimizer."""
    found = killed_and_whole(base, tmp_path, device, stage, full_determinism=True)
    assert found["whole"] == found["killed"]


@on_each_device
def test_a_killed_run_ends_near_a_whole_one_without_full_determinism(base, tmp_path, device):
    """Sums on a GPU may then come out differently, so that only the frozen half is equal for certain."""
    found = killed_and_whole(base, tmp_path, device, "sft")
    (some, saved), (others, theirs) = found.values()
    assert some == pytest.approx(others, rel=0.05)
    frozen = json.loads((tmp_path / "whole" / "seen.json").read_text())["frozen"]
    assert all(saved[name] == theirs[name] == fingerprint(weights(base)[name]) for name in frozen)


def killed_and_whole(base, folder, device, stage, **settings):
    """Losses and fingerprints of a whole run and one that is killed before its third step and resumed."""
    settings = {"save_strategy": "steps", "save_steps": 2, **settings}
    arguments = (base, device, stage)
    assert in_own_process(folder / "whole", *arguments, settings=settings) == 0, log(folder / "whole")
    assert in_own_process(folder / "killed", *arguments, kill_at=2, settings=settings) == -9, log(folder / "killed")
    assert in_own_process(folder / "killed", *arguments, resume=True, settings=settings) == 0, log(folder / "killed")
    found = {}
    for name in ("whole", "killed"):
        seen = json.loads((folder / name / "seen.json").read_text())
        assert seen["device"].startswith(device)
        saved = {key: fingerprint(tensor) for key, tensor in weights(folder / name).items()}
        found[name] = (seen["losses"], saved)
    return found


BACKENDS = {"ddp": "MULTI_{}", "fsdp2": "FSDP", "fsdp2, offloaded": "FSDP"}
GPUS = {"cpu": "CPU", "cuda": "GPU"}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize(
    ("device", "launch"),
    [("cpu", "ddp"), ("cpu", "fsdp2"), *(pytest.param("cuda", launch, marks=GPU.marks) for launch in BACKENDS)],
)
def test_one_rank_trains_saves_and_keeps_the_frozen_half(run, base, tmp_path, device, launch, stage):
    """FSDP2 with CPU offload too, which needs pinned memory and so a GPU. The losses are those of no launch."""
    folder = tmp_path / "out"
    assert in_own_process(folder, base, device, stage, launch=launch) == 0, log(folder)
    seen = kept(base, folder, BACKENDS[launch].format(GPUS[device]))
    assert seen["losses"] == pytest.approx(run(device, stage)[0], rel=0.05)


@pytest.mark.parametrize(("stage", "settings"), ON_A_GPU)
@pytest.mark.parametrize("launch", ["ddp", "fsdp2"])
@pytest.mark.parametrize("device", [GPU])
def test_what_needs_a_gpu_trains_with_one_rank(base, tmp_path, device, launch, stage, settings):
    folder = tmp_path / "out"
    assert in_own_process(folder, base, device, stage, launch=launch, settings=settings) == 0, log(folder)
    kept(base, folder, BACKENDS[launch].format(GPUS[device]))

"""Backends: what cannot keep a half frozen is refused before anything is loaded."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from conftest import parse_recipe
from trl import DPOConfig, SFTConfig

from hft_trl import HFTConfig, HFTDPOTrainer, HFTError, HFTSFTTrainer
from hft_trl.backends.fsdp import fsdp_version
from hft_trl.recipe.rehearsal import check_chain
from hft_trl.trainers.compatibility import check


@pytest.fixture
def fsdp1(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)


def test_the_version_of_fsdp_is_known_before_there_is_an_accelerator(monkeypatch):
    assert fsdp_version() is None
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert fsdp_version() is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert fsdp_version() == 2
    check(None, HFTConfig())
    monkeypatch.delenv("FSDP_VERSION")
    assert fsdp_version() == 1  # accelerate's default


def test_weights_that_only_the_first_process_loads_are_refused_before_the_model_is_loaded(monkeypatch):
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(HFTError, match="fsdp_cpu_ram_efficient_loading is true"):
        check(None, HFTConfig())


@pytest.mark.parametrize(("trainer", "config"), [(HFTSFTTrainer, SFTConfig), (HFTDPOTrainer, DPOConfig)])
def test_fsdp1_is_refused_with_the_reason_before_the_model_is_loaded(fsdp1, tmp_path, trainer, config):
    with pytest.raises(HFTError, match=r"fsdp_version is 1, which flattens .* set fsdp_version to 2"):
        trainer(model="no/such-model", args=config(str(tmp_path), use_cpu=True, bf16=False), train_dataset=None)


def test_recipes_refuse_fsdp1_first_of_all_unless_everything_learns(fsdp1, tmp_path):
    flags = [
        "--model",
        "no/such-model",
        "--output_dir",
        str(tmp_path),
        "--sft.dataset",
        "demo",
        "--dpo.dataset",
        "demo",
    ]
    with pytest.raises(HFTError, match="fsdp_version"):
        parse_recipe(flags).stages["sft"].check()
    with pytest.raises(HFTError, match="no/such-model"):
        parse_recipe([*flags, "--method", "fft"]).stages["sft"].check()


@pytest.mark.parametrize("size", ["tp_size", "cp_size", "sp_size"])
def test_parallelism_within_a_matrix_or_a_row_is_refused_wherever_it_is_asked_for(tmp_path, monkeypatch, size):
    """By the trainer's arguments, by the launch configuration, and by a state that was set up by other code."""
    state = SimpleNamespace(parallelism_config=ParallelismConfig(**{size: 2}), distributed_type="NO")
    with pytest.raises(HFTError, match=rf"parallelism_config has {size} 2, .*fsdp2\.yaml"):
        check(None, HFTConfig(), state=state)
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    check(args, HFTConfig())
    args.parallelism_config = ParallelismConfig(**{size: 2})
    with pytest.raises(HFTError, match=f"parallelism_config has {size} 2"):
        HFTSFTTrainer(model="no/such-model", args=args)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size.upper()}", "2")
    with pytest.raises(HFTError, match=f"parallelism_config has {size} 2"):
        check(None, HFTConfig())


@pytest.mark.parametrize("setting", [{"tp_plan": "auto"}, {"distributed_config": {"tp_size": 2}}])
def test_a_model_that_would_be_divided_on_loading_is_refused(tmp_path, setting):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", model_init_kwargs=setting)
    with pytest.raises(HFTError, match=f"model_init_kwargs has {next(iter(setting))}"):
        HFTSFTTrainer(model="no/such-model", args=args)


def test_one_process_that_sees_several_gpus_is_told_to_use_one_or_all(tmp_path, monkeypatch):
    """Not on a CPU, nor where the user placed the model, or says how."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    check(args, HFTConfig())
    args.use_cpu = False
    with pytest.raises(HFTError, match=r"8 GPUs are visible to one process.*CUDA_VISIBLE_DEVICES=0"):
        check(args, HFTConfig(), {"model": "some/model"})
    check(args, HFTConfig(), {"model": torch.nn.Linear(1, 1)})
    args.model_init_kwargs = {"device_map": {"": 0}}
    check(args, HFTConfig(), {"model": "some/model"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "auto"])
def test_a_chain_whose_next_stage_would_round_is_refused_before_the_first_one(tmp_path, monkeypatch, dtype):
    """With method fft TRL saves FSDP2's float32 weights, with hft they have the start model's type."""
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=True, report_to="none", model_init_kwargs={"dtype": dtype})
    fft, hft = (SimpleNamespace(name=m, hft=HFTConfig(method=m), args=args) for m in ("fft", "hft"))
    check_chain([fft, hft])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_chain([hft, hft])
    check_chain([hft, fft])
    if dtype == "bfloat16":
        with pytest.raises(HFTError, match=r"model\.dtype is bfloat16, .*fft.*set model\.dtype to float32"):
            check_chain([fft, hft])
    else:
        check_chain([fft, hft])

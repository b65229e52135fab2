"""Backends: what can't keep a half frozen is refused before anything is loaded."""

import pytest
from datasets import Dataset, disable_caching, enable_caching
from trl import DPOConfig, SFTConfig

from hft_trl import HFTDPOTrainer, HFTError, HFTSFTTrainer
from hft_trl.backends import check_launch, fsdp_version, seen_by_all
from hft_trl.recipe import parse_recipe
from hft_trl.stage import check_model


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
    check_launch()
    monkeypatch.delenv("FSDP_VERSION")
    assert fsdp_version() == 1  # accelerate's default


def test_weights_that_only_the_first_process_loads_are_refused_before_the_model_is_loaded(monkeypatch):
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(HFTError, match="fsdp_cpu_ram_efficient_loading is true"):
        check_launch()


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
        check_model(parse_recipe(flags).sft)
    with pytest.raises(HFTError, match="no/such-model"):
        check_model(parse_recipe([*flags, "--method", "fft"]).sft)


def test_one_process_keeps_its_rows_where_they_are(tmp_path):
    rows = Dataset.from_list([{"a": 1}])
    assert seen_by_all(rows, tmp_path / "rows") is rows
    assert not (tmp_path / "rows").exists()


def test_several_processes_without_datasets_cache_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hft_trl.backends.PartialState", lambda: type("State", (), {"num_processes": 2}))
    disable_caching()
    try:
        with pytest.raises(HFTError, match="caching is off"):
            seen_by_all(Dataset.from_list([{"a": 1}]), tmp_path)
    finally:
        enable_caching()

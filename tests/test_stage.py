"""What is found wrong with a stage before its data are prepared."""

from types import SimpleNamespace

import pytest
from conftest import one_line

from hft_trl import HFTError, stage
from hft_trl.meta import build_on_meta
from hft_trl.planning.shapes import shape_of
from hft_trl.recipe import parse_recipe
from hft_trl.stage import check_model


@pytest.fixture
def stage_of(tmp_path):
    """The first stage of a run from a model."""

    def parse(model, *flags):
        data = ("--sft.dataset", "demo", "--dpo.dataset", "demo")
        return parse_recipe(["--model", str(model), "--output_dir", str(tmp_path), *data, *flags]).sft

    return parse


@pytest.fixture
def published(monkeypatch):
    """A hub where there is Llama 2's config, and nothing else."""
    monkeypatch.setattr(stage, "build_on_meta", lambda model, *_: build_on_meta(shape_of(model)))
    return "meta-llama/Llama-2-7b-hf"


def test_a_type_that_rounds_a_folder_s_files_is_refused_before_the_data_are_prepared(stage_of, base):
    """The files decide. Full fine-tuning may round, and DeepSpeed's cast is named as what does it."""
    for flags in ((), ("--model.dtype", "auto"), ("--model.dtype", "bfloat16", "--method", "fft")):
        check_model(stage_of(base, *flags))
    with pytest.raises(HFTError, match=r"dtype bfloat16 rounds .* which is F32 .* load the model with dtype float32"):
        check_model(stage_of(base, "--model.dtype", "bfloat16"))
    under_zero = stage_of(base)
    under_zero.args.deepspeed_plugin, under_zero.args.mixed_precision = SimpleNamespace(zero_stage=2), "bf16"
    with pytest.raises(HFTError, match="DeepSpeed's mixed precision casts the whole model"):
        check_model(under_zero)
    under_zero.args.mixed_precision = "no"
    check_model(under_zero)


def test_of_a_model_on_the_hub_the_config_tells_the_type_of_files_that_are_not_here_yet(stage_of, published):
    for flags in ((), ("--model.dtype", "float16"), ("--model.dtype", "bfloat16", "--method", "fft")):
        check_model(stage_of(published, *flags))
    with pytest.raises(HFTError) as error:
        check_model(stage_of(published, "--model.dtype", "bfloat16"))
    assert "dtype bfloat16 rounds 'meta-llama/Llama-2-7b-hf', whose config says float16" in one_line(error)


def test_a_config_that_tells_no_type_is_no_reason_to_refuse(stage_of, published, monkeypatch):
    skeleton = build_on_meta(shape_of(published))
    skeleton.config.dtype = None
    monkeypatch.setattr(stage, "build_on_meta", lambda *_: skeleton)
    check_model(stage_of(published, "--model.dtype", "bfloat16"))

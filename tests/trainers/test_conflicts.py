"""What would undo a half that is frozen is rejected before a model is loaded, naming the setting and the fix."""

from pathlib import Path

import pytest
from conftest import one_line
from training import sft_trainer
from trl import SFTConfig

from hft_trl import HFTConfig, HFTError, HFTSFTTrainer
from hft_trl.config import STORAGE as STORAGE_SETTINGS
from hft_trl.recipe import parse_stage
from hft_trl.trainers.compatibility import LAUNCH, ON, STORAGE, check


@pytest.mark.parametrize("setting", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_that_casts_the_model_is_rejected_with_hft_only(base, tulu, tmp_path, setting):
    """With method fft it casts the model, as the parent does."""
    with pytest.raises(HFTError, match=f"{setting} is true, which casts .* set it to false") as error:
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(), **{setting: True})
    one_line(error)
    full = sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(method="fft"), **{setting: True})
    full.evaluate(full.train_dataset)
    assert {str(p.dtype) for p in full.model.parameters()} == {
        "torch.bfloat16" if "bf" in setting else "torch.float16"
    }
    full.save_model()
    flags = [
        "--model_name_or_path",
        "demo",
        "--dataset_name",
        "demo",
        "--output_dir",
        str(tmp_path),
        f"--{setting}",
        "true",
    ]
    with pytest.raises(HFTError, match=setting):
        parse_stage("sft", SFTConfig, flags)


@pytest.mark.parametrize(("page", "conflicts"), [("memory", STORAGE), ("distributed", LAUNCH)])
def test_the_tables_in_the_docs_are_the_table_that_is_applied(page, conflicts):
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    documented = text.partition("| setting | not with | instead |\n|---|---|---|\n")[2].partition("\n\n")[0]
    remedies = [text.partition(": ")[2].replace("{case.autocast}", "bf16 or fp16") for _, text in conflicts.values()]
    rows = [
        f"| `{setting}` | {beside} | {remedy} |" for (setting, beside), remedy in zip(conflicts, remedies, strict=True)
    ]
    assert documented.splitlines() == rows


def test_a_model_that_would_be_loaded_quantized_is_rejected_before_it_is_loaded(tmp_path):
    init = {"quantization_config": {"load_in_8bit": True}}
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs=init)
    with pytest.raises(HFTError, match=r"a quantization_config was passed: drop it") as error:
        HFTSFTTrainer(model="no/such-model", args=args, train_dataset=None)
    one_line(error)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel is true, .*: run pip install liger-kernel, or leave"),
        (
            {"model_init_kwargs": {"attn_implementation": "flash_attention_2"}},
            "attn_implementation is 'flash_attention_2', .*: run pip install kernels, or leave",
        ),
    ],
)
@pytest.mark.parametrize("method", ["hft", "fft"])
def test_a_missing_package_is_named_with_pip_s_command_before_a_model_is_loaded(tmp_path, settings, said, method):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    with pytest.raises(HFTError, match=said) as error:
        HFTSFTTrainer(model="no/such-model", args=args, train_dataset=None, hft_config=HFTConfig(method=method))
    one_line(error)
    given = ["--model_name_or_path", "demo", "--dataset_name", "demo", "--output_dir", str(tmp_path)]
    name, value = next(iter(settings.items()))
    flags = (
        ["--attn_implementation", "flash_attention_2"] if name == "model_init_kwargs" else [f"--{name}", str(value)]
    )
    with pytest.raises(HFTError, match=said):
        parse_stage("sft", SFTConfig, [*given, *flags, "--method", method])


def test_an_attention_of_a_part_of_the_model_needs_its_package_too(tmp_path):
    def asked(**parts):
        return SFTConfig(str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs={"attn_implementation": parts})

    check(asked(text_config="eager", vision_config=None), HFTConfig())
    with pytest.raises(HFTError, match=r"attn_implementation is 'flash_attention_2', .*: run pip install kernels"):
        check(asked(text_config="flash_attention_2", vision_config="sdpa"), HFTConfig())


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_activations_are_not_offloaded_without_a_gpu(base, tulu, tmp_path, method):
    """Where TRL fails with an AttributeError."""
    with pytest.raises(HFTError, match=r"activation_offloading is true, .* no GPU is available: set it") as error:
        sft_trainer(HFTSFTTrainer, base, tulu, tmp_path, HFTConfig(method=method), activation_offloading=True)
    one_line(error)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "lion_32bit", "adafactor"])
def test_an_optimizer_that_takes_no_sharded_tensors_is_rejected_under_fsdp2(tmp_path, monkeypatch, optim):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, optim=optim)
    check(args, HFTConfig())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(HFTError, match=f"optim is {optim}, .* FSDP2 shards: set it to adamw_torch_fused") as error:
        check(args, HFTConfig())
    one_line(error)
    check(args, HFTConfig(), {"optimizer_cls_and_kwargs": (object, {})})
    check(SFTConfig(str(tmp_path), use_cpu=True, bf16=False, optim="adamw_torch_fused"), HFTConfig())


def test_every_setting_of_the_table_exists():
    ours = {f"hft.{name}" for name in vars(HFTConfig())}
    named = {setting for setting, _ in (*STORAGE, *LAUNCH) if setting.startswith("hft.")}
    assert named <= ours
    assert named == ON.keys()
    assert {f"hft.{name}" for name in STORAGE_SETTINGS} - named == {"hft.share_reference"}  # others name it

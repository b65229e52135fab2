"""Building from a config alone: no weights are read, and what cannot be trained is refused."""

import json

import pytest
from conftest import tiny_llama
from transformers import BertConfig, GPT2Config, T5Config, WhisperConfig
from typer.testing import CliRunner

from hft_trl import HFTError
from hft_trl.cli import app
from hft_trl.skeleton import build_on_meta


def test_only_the_config_is_read(tmp_path):
    model = tiny_llama(300)
    model.config.save_pretrained(tmp_path)
    skeleton = build_on_meta(str(tmp_path))
    assert {name: p.shape for name, p in skeleton.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }
    assert all(p.is_meta for p in skeleton.parameters())


@pytest.mark.parametrize("config", [T5Config(), WhisperConfig()], ids=lambda config: config.model_type)
def test_a_model_that_is_no_causal_lm_is_named(tmp_path, config):
    config.architectures = [
        "T5ForConditionalGeneration" if config.model_type == "t5" else "WhisperForConditionalGeneration"
    ]
    config.save_pretrained(tmp_path)
    with pytest.raises(HFTError, match=config.architectures[0]):
        build_on_meta(str(tmp_path))


def test_a_class_that_could_be_a_causal_lm_but_is_not_saved_as_one_is_refused(tmp_path):
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(HFTError, match="BertForMaskedLM, which is no causal LM"):
        build_on_meta(str(tmp_path))


def test_a_config_without_architectures_is_taken_by_its_type(tmp_path):
    GPT2Config(n_layer=2, n_embd=32, n_head=2).save_pretrained(tmp_path)
    assert type(build_on_meta(str(tmp_path))).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize("content", ["{", json.dumps({"model_type": "no_such_model"}), json.dumps({})])
def test_a_config_that_can_not_be_read_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(HFTError) as error:
        build_on_meta(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_code_from_the_repository_does_not_run_unless_it_is_trusted(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
        )
    )
    (tmp_path / "own.py").write_text("raise SystemExit('code ran')")
    with pytest.raises(HFTError, match="trust_remote_code"):
        build_on_meta(str(tmp_path))


@pytest.mark.parametrize(
    "command",
    [
        ["diff", "demo"],
        ["repair", "demo"],
        ["half-reset", "--base", "demo", "--tuned"],
        ["select"],
        ["plan"],
        ["generate"],
    ],
)
def test_every_command_names_a_path_that_is_no_model(command, tmp_path):
    """Missing, a run, a file of a model or impossible. The hub is not asked for them, nor is a model built."""
    (tmp_path / "run" / "sft").mkdir(parents=True)
    (tmp_path / "run" / "sft" / "config.json").write_text("{}")
    more = {"generate": ["--prompts", "hi"], "repair": ["--out", "new"], "half-reset": ["--out", "new"]}.get(
        command[0], []
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name, words in (
        ("none", "does not exist: correct the path"),
        ("model.safetensors", "is a file: give the folder that holds the whole model"),
        ("y" * 300, "cannot be read (File name too long)"),
        ("run", f"is a run: give one of its models, {tmp_path}/run/sft"),
    ):
        found = CliRunner().invoke(app, [*command, str(tmp_path / name), *more])
        assert found.exit_code == 2
        assert f"model folder '{tmp_path}/{name}' {words}" in " ".join(found.stderr.split())

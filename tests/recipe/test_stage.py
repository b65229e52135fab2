"""What is found wrong with a stage before its data are prepared."""

import json
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import one_line, parse_recipe
from training import ResumableSFTTrainer
from trl import GRPOConfig, SFTConfig

from hft_trl import HFTError, demo
from hft_trl.recipe.folder import open_stages


@pytest.fixture
def stage_of(tmp_path):
    """The first stage of a run from a model."""

    def parse(model, *flags):
        data = ("--sft.dataset", "demo", "--dpo.dataset", "demo")
        return parse_recipe(["--model", str(model), "--output_dir", str(tmp_path), *data, *flags]).stages["sft"]

    return parse


def test_a_stage_of_a_trainer_that_generates_reads_its_prompts_from_pairs(tmp_path):
    """GRPO's config has neither the settings of preparing rows nor those of a reference that is passed."""
    flags = ["--output_dir", str(tmp_path), "--grpo.dataset", "demo", "--grpo.split", "train_prefs[:8]"]
    given = {"stages": {"sft": SFTConfig, "grpo": GRPOConfig}, "default_config": demo.RECIPE}
    stage = parse_recipe(flags, **given).stages["grpo"]
    stage.check()
    stage.load_data()
    assert len(stage.train_dataset["prompt"]) == 8
    assert stage.args.include_num_input_tokens_seen == "no"  # it counts them itself
    with pytest.raises(HFTError, match=r"unknown key grpo\.reference_quantization"):
        parse_recipe([*flags, "--grpo.reference_quantization", "8bit"], **given)


def test_an_adapter_is_refused_with_how_to_merge_it(stage_of, tmp_path):
    adapter = shutil.copytree(demo.MODEL, tmp_path / "adapter")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(HFTError, match=r"is an adapter.*merge_and_unload") as error:
        stage_of(adapter).check()
    one_line(error)


def test_a_run_folder_is_answered_with_its_models_and_a_missing_folder_is_called_that(stage_of, tmp_path):
    for name in ("sft", "dpo"):
        shutil.copytree(demo.MODEL, tmp_path / "run" / name)
    with pytest.raises(HFTError) as error:
        stage_of(tmp_path / "run").check()
    assert one_line(error).endswith(
        f"run' is a run: give one of its models, {tmp_path}/run/dpo or {tmp_path}/run/sft."
    )
    for name in (tmp_path / "none", "tests/none", "./none"):
        with pytest.raises(HFTError, match=rf"model folder '{name}' does not exist: correct the path"):
            stage_of(name).check()
    with pytest.raises(HFTError, match="'nobody/none' has no readable config"):
        stage_of("nobody/none").check()


def test_a_folder_without_a_tokenizer_says_so(stage_of, base, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, bare / name)
    with pytest.raises(HFTError, match=r"no tokenizer was found for .*bare': save the one that belongs to the model"):
        stage_of(bare).load_tokenizer()


def test_trl_s_chat_template_path_is_the_template_whose_marks_are_looked_for(stage_of, tmp_path):
    """TRL sets it in the trainer, in place of the tokenizer's own, which may have no marks."""
    model = shutil.copytree(demo.MODEL, tmp_path / "model")
    marked = tmp_path / "marked.jinja"
    marked.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(HFTError, match="generation"):
        stage_of(model).load_tokenizer()
    path = ("--sft.chat_template_path", str(marked))
    assert stage_of(model, *path).load_tokenizer().chat_template == marked.read_text()
    both = stage_of(model, *path, "--model.chat_template", "tulu").load_tokenizer()
    assert both.chat_template == marked.read_text()
    with pytest.raises(HFTError, match=r"give 'tulu' or the path of a .jinja file"):
        stage_of(model, "--sft.chat_template_path", str(model)).load_tokenizer()


def test_an_error_before_the_first_step_is_one_line_and_a_later_one_is_not(stage_of, monkeypatch):
    """What stops training before it begins comes of settings; a fault in the middle keeps its traceback."""
    sft = stage_of(demo.MODEL, "--sft.max_steps", "2", "--sft.split", "train[:8]", "--sft.report_to", "none")
    open_stages([sft])
    sft.load_data()
    made = {
        "args": sft.args,
        "train_dataset": sft.train_dataset,
        "processing_class": sft.load_tokenizer(),
        "hft_config": sft.hft,
    }
    trainer = ResumableSFTTrainer(model=str(demo.MODEL), **made)

    def fails(*_, **__):
        raise ValueError("nothing works\nat all.")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "get_train_dataloader", fails)
        with pytest.raises(HFTError, match="sft: training cannot begin: nothing works at all") as error:
            sft.train(trainer)
        one_line(error)
    trainer = ResumableSFTTrainer(model=str(demo.MODEL), **made)
    monkeypatch.setattr(trainer, "compute_loss", fails)
    with pytest.raises(ValueError, match="nothing works\nat all") as error:
        sft.train(trainer)
    assert not isinstance(error.value, HFTError)


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_each_upload_to_the_hub_has_the_selection_and_a_card_that_names_the_data(stage_of, base, monkeypatch, method):
    """Of a model without the selection, a next stage would draw as if it had not been trained with HFT."""
    uploads = []

    class Hub:
        def create_repo(self, *_, **__):
            return SimpleNamespace(repo_id="me/tuned")

        def upload_folder(self, folder_path, commit_message, **_):
            files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}
            uploads.append((commit_message, files))
            done = Future()
            done.set_result(None)
            return done

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr("hft_trl.recipe.folder.whoami", lambda **_: {})
    flags = "--sft.push_to_hub true --sft.hub_strategy every_save --sft.save_strategy steps --sft.save_steps 1"
    flags += f" --sft.max_steps 1 --sft.split train[:8] --sft.report_to none --method {method}"
    sft = stage_of(base, *flags.split(), "--retention.max_rows", "0")
    sft.load_data()
    open_stages([sft])
    made = {"args": sft.args, "train_dataset": sft.train_dataset, "processing_class": sft.load_tokenizer()}
    sft.train(ResumableSFTTrainer(model=str(base), **made, hft_config=sft.hft))
    assert [message for message, _ in uploads] == ["Training in progress, step 1", "Model save"]
    for _, files in uploads:
        assert files["hft_selection.json"] == (sft.folder / "hft_selection.json").read_bytes()
        assert f"fine-tuned version of `{base}` on `demo`." in files["README.md"].decode()
        assert files["model.safetensors"] == (sft.folder / "model.safetensors").read_bytes()


def test_the_source_text_of_wanda_is_checked_before_anything_is_trained(stage_of, base, tmp_path):
    """The embedded model has its own, in every stage of a run that starts from it."""
    wanda = ("--hft.strategy", "importance", "--hft.importance", "wanda")
    with pytest.raises(HFTError, match=r"hft\.source_texts is missing"):
        stage_of(base, *wanda).check()
    with pytest.raises(HFTError, match=r"none\.txt.* cannot be read"):
        stage_of(base, *wanda, "--hft.source_texts", str(tmp_path / "none.txt")).check()
    (tmp_path / "source.txt").write_text("Ada lives in Rome.")
    stage_of(base, *wanda, "--hft.source_texts", str(tmp_path / "source.txt")).check()
    words = ["--output_dir", str(tmp_path / "run"), *wanda]
    for stage in parse_recipe(words, default_config=demo.RECIPE).stages.values():
        assert stage.hft.source_texts == "demo"
        stage.check()


def test_a_pattern_that_only_a_later_stage_excludes_is_checked_before_anything_is_trained(tmp_path):
    words = ["--output_dir", str(tmp_path / "run"), "--dpo.hft.exclude", "nothing"]
    stages = parse_recipe(words, default_config=demo.RECIPE).stages
    stages["sft"].check()
    with pytest.raises(HFTError, match=r"hft\.exclude holds 'nothing'"):
        stages["dpo"].check()

"""Checkpoints: a torn one is named and passed over, the newest whole one is found."""

import inspect
import json
import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import one_line, tiny_llama
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from training import ResumableSFTTrainer, sft_trainer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from hft_trl import HFTConfig, HFTError, select
from hft_trl.checkpoints.whole import (
    MANIFEST_FILE,
    MARK_FILE,
    check_layout,
    check_whole,
    last_whole_checkpoint,
    set_aside,
    torn_because,
)
from hft_trl.recipe.folder import LOCK_FILE
from hft_trl.selection.previous import selection_of


def checkpoint(folder, step):
    """What a trainer leaves, as far as wholeness is concerned."""
    path = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    path.mkdir()
    save_file({"w": torch.full((100,), float(step))}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        (path / name).write_bytes(b"x")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def from_the_hub(checkpoint):
    """Remove what is not uploaded with a checkpoint, and its manifest, as if stock TRL had saved it."""
    for name in (MANIFEST_FILE, MARK_FILE):
        (checkpoint / name).unlink()


def test_the_newest_whole_checkpoint_is_found_by_its_step(tmp_path):
    assert last_whole_checkpoint(tmp_path / "missing") is None
    assert last_whole_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_with_a_missing_file_is_passed_over_and_kept(tmp_path, name):
    checkpoint(tmp_path, 1)
    torn = checkpoint(tmp_path, 2)
    (torn / name).unlink()
    assert name in torn_because(torn)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert torn.is_dir()


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_a_checkpoint_with_a_file_cut_short_is_passed_over(tmp_path, name):
    checkpoint(tmp_path, 1)
    torn = checkpoint(tmp_path, 2) / name
    torn.write_bytes(torn.read_bytes()[:-3])
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_models_selection_is_found_in_its_folder_and_nowhere_else(base, tmp_path):
    folder = tmp_path / "trained"
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert selection_of(model) is None
    selection = select(model, HFTConfig())
    selection.save(folder)
    assert selection_of(model).digest == selection.digest
    assert selection_of(tiny_llama(300)) is None
    model.config._name_or_path = str(tmp_path / "gone by now")
    assert selection_of(model) is None


def trained(base, rows, folder, **settings):
    """A trainer that saves a checkpoint at every step."""
    settings = {
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False,
        "logging_steps": 1, "per_device_train_batch_size": 4, "max_steps": 3, "save_steps": 1, **settings,
    }  # fmt: skip
    data = Dataset.from_dict({"text": [str(row) for row in rows["messages"]]})
    return ResumableSFTTrainer(model=str(base), args=SFTConfig(str(folder), **settings), train_dataset=data)


@pytest.fixture(scope="module")
def sealed(base, tulu, tmp_path_factory):
    """Checkpoints as the trainer leaves them."""
    folder = tmp_path_factory.mktemp("sealed")
    trained(base, tulu, folder).train()
    return folder


def test_a_manifest_names_every_file_with_its_size_and_what_the_run_was(sealed):
    for step in (1, 2, 3):
        folder = sealed / f"checkpoint-{step}"
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST_FILE}
        assert manifest["files"] == sizes
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "hft_selection.json"} <= sizes.keys()
        assert manifest["backend"] == "one process or DDP"
        assert (manifest["processes"], manifest["global_batch_size"]) == (1, 4)


def test_any_file_that_is_missing_or_cut_short_makes_a_checkpoint_torn_and_is_named(sealed, tmp_path, caplog):
    names = [path.name for path in (sealed / "checkpoint-3").iterdir()]
    assert len(names) > 10
    logging.getLogger("transformers").addHandler(caplog.handler)
    for name in names:
        for harm in (Path.unlink, lambda path: os.truncate(path, path.stat().st_size // 2)):
            folder = Path(shutil.copytree(sealed, tmp_path / "run"))
            harm(folder / "checkpoint-3" / name)
            caplog.clear()
            assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
            assert name in caplog.text
            assert str(folder / "checkpoint-3") in caplog.text
            assert (folder / "checkpoint-3").is_dir()
            shutil.rmtree(folder)
    logging.getLogger("transformers").removeHandler(caplog.handler)


def test_resuming_passes_over_a_torn_checkpoint_and_keeps_it_under_another_name(base, tulu, sealed, tmp_path):
    """
    Nothing new is mixed into it, rotation neither counts nor removes it, and the weights are those of a run in one go.
    """
    folder = Path(shutil.copytree(sealed, tmp_path / "run"))
    torn = (folder / "checkpoint-3" / "optimizer.pt").read_bytes()[:-1]
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(torn)
    for _ in range(2):
        again = trained(base, tulu, folder, save_total_limit=1)
        again.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == ["_torn-checkpoint-3", "checkpoint-3"]
    assert (folder / "_torn-checkpoint-3" / "optimizer.pt").read_bytes() == torn
    for name in ("model.safetensors", "rng_state.pth", "scheduler.pt"):
        assert (folder / "checkpoint-3" / name).read_bytes() == (sealed / "checkpoint-3" / name).read_bytes()


def test_where_no_checkpoint_is_whole_resuming_says_so(base, tulu, sealed, tmp_path):
    folder = Path(shutil.copytree(sealed, tmp_path / "run"))
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / MANIFEST_FILE).unlink()
    with pytest.raises(HFTError, match=r"no checkpoint in .* is complete"):
        trained(base, tulu, folder).train(resume_from_checkpoint=True)
    (folder / "checkpoint-1" / MANIFEST_FILE).write_text("{")
    with pytest.raises(HFTError, match="is incomplete"):
        trained(base, tulu, folder).train(resume_from_checkpoint=folder / "checkpoint-1")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"])
@pytest.mark.parametrize("sealed_too", [True, False], ids=["sealed", "from-the-hub"])
def test_a_checkpoint_that_is_named_and_has_lost_a_part_is_refused(base, tulu, sealed, tmp_path, name, sealed_too):
    """
    transformers would begin anew in that part, without a word.

    One from the hub has no manifest, and else is whole.
    """
    folder = Path(shutil.copytree(sealed / "checkpoint-2", tmp_path / "downloaded"))
    if not sealed_too:
        from_the_hub(folder)
        check_whole(folder, processes=1)
        with pytest.raises(HFTError, match=r"rng_state_0\.pth is missing"):
            check_whole(folder, processes=2)
    (folder / name).unlink()
    with pytest.raises(HFTError, match=rf"downloaded is incomplete \({name} is missing"):
        trained(base, tulu, tmp_path / "run").train(resume_from_checkpoint=str(folder))


def test_what_is_set_aside_and_computed_beside_a_model_is_not_uploaded(tmp_path):
    """By the patterns with which transformers' trainer uploads its output folder."""
    (tmp_path / "checkpoint-2").mkdir()
    assert set_aside(tmp_path / "checkpoint-2")
    (aside,) = tmp_path.iterdir()
    names = ["model.safetensors", f"{aside.name}/optimizer.pt", "_reference_log_probs/train/data.arrow", LOCK_FILE]
    uploads = re.findall(r"ignore_patterns=(.*),\n", inspect.getsource(Trainer))
    assert uploads == ['["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]'] * 2
    assert list(filter_repo_objects(names, ignore_patterns=["_*", "checkpoint-*"])) == ["model.safetensors"]


@pytest.mark.parametrize("dies_in", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_rotation_removes_the_last_whole_checkpoint_only_when_the_next_is_whole(
    base, tulu, tmp_path, monkeypatch, dies_in
):
    """With save_total_limit=1 and a save of the next one that fails on its way, wherever it does."""
    trainer = trained(base, tulu, tmp_path, save_total_limit=1)
    save = getattr(ResumableSFTTrainer, dies_in)

    def die_at_two(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResumableSFTTrainer, dies_in, die_at_two)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert trainer.args.save_total_limit == 1
    trained(base, tulu, tmp_path, save_total_limit=1).train(resume_from_checkpoint=True)
    names = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    assert names == ["_torn-checkpoint-2", "checkpoint-3"]


def test_half_an_epoch_resumed_at_its_last_step_trains_no_step_more(base, tulu, tmp_path):
    """transformers always trains one step more there, and ends in other weights."""
    settings = {"max_steps": -1, "num_train_epochs": 0.5}
    whole = trained(base, tulu, tmp_path, **settings)
    whole.train()
    step = whole.state.global_step
    assert 0 < step < 8
    rerun = trained(base, tulu, tmp_path, **settings)
    rerun.train(resume_from_checkpoint=True)
    assert rerun.state.global_step == step
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, rerun.model.get_parameter(name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"backend": "FSDP with FULL_STATE_DICT"},
            ["saved by FSDP with FULL_STATE_DICT", "one process or DDP cannot read"],
        ),
        ({"backend": "DeepSpeed ZeRO-2"}, ["saved by DeepSpeed ZeRO-2"]),
        ({"global_batch_size": 64}, ["global batch of 64", "this run has 4", "per_device_train_batch_size"]),
    ],
)
def test_a_checkpoint_of_another_backend_or_batch_is_refused(base, tulu, sealed, tmp_path, change, words):
    folder = Path(shutil.copytree(sealed, tmp_path / "run"))
    path = folder / "checkpoint-3" / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(HFTError) as error:
        trained(base, tulu, folder).train(resume_from_checkpoint=True)
    assert all(word in str(error.value) for word in words)


def test_another_number_of_processes_is_refused_where_the_optimizer_is_divided(sealed, tmp_path):
    here = {"backend": "one process or DDP", "processes": 2, "global_batch_size": 4}
    check_layout(sealed / "checkpoint-3", here)
    check_layout(sealed / "checkpoint-3", {**here, "global_batch_size": 8}, any_batch=True)
    folder = Path(shutil.copytree(sealed / "checkpoint-3", tmp_path / "checkpoint-3"))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, "backend": "DeepSpeed ZeRO-2"}))
    with pytest.raises(HFTError, match="launch 1 processes"):
        check_layout(folder, {**here, "backend": "DeepSpeed ZeRO-2"})


def damage(path: Path, harm: str) -> None:
    """Change a file in its own length, so that its size says nothing."""
    content = bytearray(path.read_bytes())
    if harm == "head":
        content[:64] = b"\xff" * 64
    elif harm == "middle":
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(byte ^ 0x55 for byte in content[middle : middle + 64])
    else:
        content[:] = bytes(len(content))
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *(("model.safetensors", harm) for harm in ("head", "zeros")),
        *(("optimizer.pt", harm) for harm in ("head", "middle", "zeros")),
        *(("scheduler.pt", harm) for harm in ("head", "zeros")),
        *(("rng_state.pth", harm) for harm in ("head", "middle", "zeros")),
        *(("trainer_state.json", harm) for harm in ("head", "zeros")),
    ],
)
def test_a_file_that_is_damaged_in_its_own_size_is_answered_in_one_line(base, tulu, sealed, tmp_path, name, harm):
    """It names the checkpoint and the fix, when nothing is trained yet; the one before it is as good as ever."""
    folder = Path(shutil.copytree(sealed, tmp_path / "run"))
    damage(folder / "checkpoint-2" / name, harm)
    trainer = trained(base, tulu, folder)
    with pytest.raises(HFTError) as error:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    message = one_line(error)
    assert str(folder / "checkpoint-2") in message
    assert "remove the folder" in message or "resume from another checkpoint" in message
    assert not trainer.state.log_history or trainer.state.global_step == 2
    assert torn_because(folder / "checkpoint-1") is None


def test_an_optimizer_that_lost_a_part_of_its_state_is_noticed_in_the_first_step(base, tulu, sealed, tmp_path):
    folder = Path(shutil.copytree(sealed, tmp_path / "run"))
    path = folder / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for entry in state["state"].values():
        del entry["exp_avg"]
    torch.save(state, path)
    from_the_hub(folder / "checkpoint-2")
    with pytest.raises(HFTError, match=r"checkpoint-2 failed before its first step was done \(KeyError: 'exp_avg'\)"):
        trained(base, tulu, folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_frozen_half_with_other_bits_is_noticed_before_a_step_is_trained(base, tulu, sealed, tmp_path):
    folder = Path(shutil.copytree(sealed, tmp_path / "run"))
    path = folder / "checkpoint-2" / "model.safetensors"
    name = json.loads((folder / "checkpoint-2" / "hft_selection.json").read_text())["frozen"][0]
    weights = load_file(path)
    weights[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(weights, path, metadata={"format": "pt"})
    trainer = trained(base, tulu, folder)
    with pytest.raises(HFTError, match=rf"checkpoint-2 failed before its first step was done .*{name}"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert trainer.state.global_step == 2


def test_what_goes_wrong_later_is_not_the_checkpoints_fault(base, tulu, sealed, tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("of another kind")

    trainer = trained(base, tulu, Path(shutil.copytree(sealed, tmp_path / "run")))
    trainer.add_callback(Fails())
    with pytest.raises(RuntimeError, match=r"^of another kind$"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_experts_are_resumed_too_and_those_that_a_checkpoint_does_not_name_are_an_error(tokenizer, tulu, tmp_path):
    """transformers saves them under the names of their hub format, and resumes with the start model's."""
    start, settings = tmp_path / "start", {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    mixture = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, **shape)
    MixtralForCausalLM(mixture).save_pretrained(start)
    tokenizer.save_pretrained(start)
    files = set()
    for name in ("a", "b"):
        trainer = sft_trainer(ResumableSFTTrainer, start, tulu, tmp_path / name, HFTConfig(), **settings)
        trainer.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-1" if name == "b" else None)
        trainer.save_model()
        files.add((tmp_path / name / "model.safetensors").read_bytes())
    assert len(files) == 1
    for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-2").named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name
    stock = sft_trainer(SFTTrainer, start, tulu, tmp_path / "stock", **settings)
    stock.train()
    trainer = sft_trainer(ResumableSFTTrainer, start, tulu, tmp_path / "c", HFTConfig(method="fft"), **settings)
    with pytest.raises(HFTError, match=r"holds no weights named model\.layers\.0\.mlp\.") as error:
        trainer.train(resume_from_checkpoint=tmp_path / "stock" / "checkpoint-1")
    one_line(error)


def test_an_optimizer_whose_state_is_in_no_checkpoint_is_not_resumed(base, tulu, sealed, tmp_path):
    """It would start again without a word, and the run end in other weights."""
    folder = Path(shutil.copytree(sealed, tmp_path / "run"))
    trainer = trained(base, tulu, folder, optim="galore_adamw_layerwise", optim_target_modules="all-linear")
    with pytest.raises(HFTError, match="optim is galore_adamw_layerwise, whose state is in no checkpoint") as error:
        trainer.train(resume_from_checkpoint=True)
    one_line(error)


@pytest.mark.parametrize("how", ["newest", "named", "from-the-hub"])
def test_a_checkpoint_that_holds_only_the_model_is_resumed_with_a_warning(base, tulu, tmp_path, caplog, how):
    """From its weights and step, as stock TRL does; never from scratch."""
    trained(base, tulu, tmp_path, save_only_model=True, max_steps=2).train()
    newest = tmp_path / "checkpoint-2"
    if how == "from-the-hub":
        from_the_hub(newest)
    again = trained(base, tulu, tmp_path, save_strategy="no")
    logging.getLogger("transformers").addHandler(caplog.handler)
    again.train(resume_from_checkpoint=True if how == "newest" else str(newest))
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert f"{newest} was saved with save_only_model" in caplog.text
    assert [row["step"] for row in again.state.log_history if "loss" in row] == [1, 2, 3]
    before, after = load_file(newest / "model.safetensors"), dict(again.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in again.hft_selection.frozen)


def test_a_checkpoint_that_holds_only_the_model_is_refused_where_the_backend_needs_more(sealed, tmp_path):
    folder = Path(shutil.copytree(sealed / "checkpoint-2", tmp_path / "checkpoint-2"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()
    from_the_hub(folder)
    check_whole(folder, processes=2)
    with pytest.raises(HFTError, match="save_only_model, and FSDP with FULL_STATE_DICT resumes from files of its own"):
        check_whole(folder, processes=2, backend="FSDP with FULL_STATE_DICT")


def test_the_best_model_of_a_moved_run_is_found_where_the_run_is_now(base, tulu, tmp_path):
    """Also if its last checkpoint is all that is left to resume from. The best one here is the first of two."""
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    steps = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}

    def best(name, resume):
        trainer = sft_trainer(ResumableSFTTrainer, base, tulu, tmp_path / name, HFTConfig(), **steps, **chosen)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.best_global_step == 1
        return trainer.model.state_dict()

    before = best("run", None)
    (tmp_path / "run").rename(tmp_path / "moved")
    after = best("moved", True)
    assert all(torch.equal(before[name], after[name]) for name in before)

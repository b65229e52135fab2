"""
LoRA and O-LoRA over rounds:

what is trained, what is merged, where a round starts, and what ends in the same bytes.
"""

import dataclasses
import json
import os
import runpy
import shutil
import signal
import sys

import faults
import pytest
import torch
from conftest import started_from, tiny_llama, write_rows
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig
from warm import ROOT, Run

from hft_trl import demo
from hft_trl.checkpoints.whole import MANIFEST_FILE, last_whole_checkpoint
from hft_trl.continual.adapters import (
    AdapterTrainer,
    OLoRATrainer,
    check_adapter,
    earlier_subspaces,
    merge,
)
from hft_trl.continual.continual_arguments import ADAPTER_FOLDER, Adapter, LoRAArguments
from hft_trl.continual.continual_recipe import parse_continual
from hft_trl.continual.rounds import Round
from hft_trl.continual.tasks import Row
from hft_trl.errors import HFTError, Stopped
from hft_trl.recipe.arguments import DataArguments, ModelArguments

LORA = LoRAArguments(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"])
WEIGHTS = f"{ADAPTER_FOLDER}/adapter_model.safetensors"


def checked(made):
    check_adapter(made.model, made.args, made.adapter)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 200, (12,), generator=generator).tolist() for _ in range(16)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in drawn])


@pytest.fixture
def make(base, rows, tokenizer, tmp_path):
    """Makes a trainer of an adapter for the tiny base."""

    def make_trainer(adapter, kind=AdapterTrainer, model=base, name="round", **settings):
        args = SFTConfig(
            str(tmp_path / name), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, learning_rate=1e-2,
            gradient_checkpointing=False, **{"max_steps": 3, "save_strategy": "no", **settings},
        )  # fmt: skip
        return kind(str(model), args, adapter, train_dataset=rows, processing_class=tokenizer)

    return make_trainer


@pytest.fixture
def first(make, tmp_path):
    """Folder of a round that has learned an adapter."""
    trainer = make(Adapter(LORA), name="round-1")
    trainer.train()
    trainer.save_model()
    return tmp_path / "round-1"


def bits(tensor):
    return tensor.detach().contiguous().numpy().tobytes()


def test_the_models_own_weights_keep_their_bits_and_the_adapter_learns(make, base):
    trainer = make(Adapter(LORA))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    start = load_file(base / "model.safetensors")
    for name, p in trainer.model.named_parameters():
        if "lora_" in name:
            assert not torch.equal(p, before[name])
        else:
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert bits(p) == bits(start[own])
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {
        id(p) for name, p in trainer.model.named_parameters() if "lora_" in name
    }


def test_a_round_leaves_a_whole_model_that_is_the_base_plus_the_scaled_product(first, base):
    """In every target module W + B A alpha / r, everything else bit for bit; and no trace of PEFT in its folder."""
    start, end, adapter = (
        load_file(base / "model.safetensors"),
        load_file(first / "model.safetensors"),
        load_file(first / WEIGHTS),
    )
    assert start.keys() == end.keys()
    moved = 0
    for name in start:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            product = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"] * (12 / 4)
            torch.testing.assert_close(end[name], start[name] + product, rtol=0, atol=1e-7)
            moved += not torch.equal(end[name], start[name])
        else:
            assert bits(start[name]) == bits(end[name])
    assert moved == 2 * 4  # modules x layers
    assert not (first / "adapter_config.json").exists()
    assert type(AutoModelForCausalLM.from_pretrained(first)).__name__ == "LlamaForCausalLM"


def test_the_card_names_the_start_model_and_the_data(make, base, tmp_path):
    """As that of a stage: what is local is no link to the hub, and nothing is called None."""
    rows = tmp_path / "rows.json"
    rows.write_text("")
    make(Adapter(LORA), name="card").create_model_card(dataset_name=str(rows))
    card = (tmp_path / "card" / "README.md").read_text()
    assert f"fine-tuned version of `{base}` on `{rows}`.\n" in card
    assert "# Model Card for card\n" in card
    assert "None" not in card


def test_merging_again_gives_the_same_bits(first, base, tmp_path):
    merge(str(base), first / ADAPTER_FOLDER).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_the_next_round_of_lora_starts_from_the_last_ones_adapter(first, make):
    trainer = make(Adapter(LORA, start=first), name="round-2")
    saved = load_file(first / WEIGHTS)
    held = {name.replace(".default", ""): p for name, p in trainer.model.named_parameters() if "lora_" in name}
    assert held.keys() == saved.keys()
    assert all(bits(held[name]) == bits(saved[name]) and held[name].requires_grad for name in saved)
    ids = torch.arange(3, 19).reshape(2, 8)
    merged = AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    with torch.no_grad():
        logits = trainer.model.eval().get_base_model().model(input_ids=ids).last_hidden_state
        expected = merged.eval().model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_o_loras_penalty_is_the_sum_of_all_overlaps_with_all_earlier_rounds(first, make, tmp_path):
    second = tmp_path / "other"
    shutil.copytree(first / ADAPTER_FOLDER, second / ADAPTER_FOLDER)
    save_file({name: t.flip(-1) for name, t in load_file(first / WEIGHTS).items()}, second / WEIGHTS)
    trainer = make(Adapter(LORA, earlier=(first, second)), OLoRATrainer, first, "round-3")
    new = {name.replace(".default", ""): p for name, p in trainer.model.named_parameters()}
    expected = sum(
        (tensor @ new[name].T).abs().sum()
        for folder in (first, second)
        for name, tensor in load_file(folder / WEIGHTS).items()
        if "lora_A" in name
    )
    torch.testing.assert_close(trainer.penalty(), 0.5 * expected)
    assert trainer.penalty() > 0

    # Orthogonal rows: what the earlier ones leave of the space
    for name, rows in earlier_subspaces((first, second)).items():
        rest = torch.linalg.svd(rows, full_matrices=True).Vh[rows.shape[0] :]
        new[name].data.copy_(rest[:4])
    assert trainer.penalty() < 1e-3
    assert trainer.penalty() < 1e-3 * expected


def test_the_greater_lambda_the_smaller_the_overlap_that_is_learned(first, make):
    overlaps = []
    for factor in (0.0, 0.5):
        lora = LoRAArguments(r=4, target_modules=["q_proj", "down_proj"], o_lora_lambda=factor)
        trainer = make(Adapter(lora, earlier=(first,)), OLoRATrainer, first, f"round-{factor}", max_steps=8)
        trainer.train()
        trainer._lambda = 1.0
        overlaps.append(trainer.penalty().item())
    assert overlaps[1] < 0.8 * overlaps[0]


def test_a_new_adapter_begins_unlike_the_earlier_ones(make, first):
    """And does so again, whatever was drawn before."""
    drawn = []
    for kind, earlier in ((AdapterTrainer, ()), (OLoRATrainer, (first,)), (OLoRATrainer, (first,))):
        torch.rand(3)
        trainer = make(Adapter(LORA, earlier=earlier), kind, first, "x")
        drawn.append({name: bits(p) for name, p in trainer.model.named_parameters() if "lora_A" in name})
    assert drawn[1] == drawn[2]
    assert all(drawn[0][name] != drawn[1][name] for name in drawn[0])


def test_the_penalty_counts_once_in_a_step_however_its_batch_is_divided(first, make):
    found = []
    for batch, steps in ((8, 1), (2, 4)):
        trainer = make(
            Adapter(LORA, earlier=(first,)), OLoRATrainer, first, f"round-{batch}",
            per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1, max_grad_norm=0.0,
            optim="sgd",
        )  # fmt: skip
        trainer.train()
        found.append({name: p for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, p in found[0].items():
        torch.testing.assert_close(p, found[1][name], rtol=0, atol=1e-6)


def test_an_adapters_checkpoint_is_whole_only_with_its_manifest(make, tmp_path):
    trainer = make(Adapter(LORA), save_strategy="steps", save_steps=1)
    trainer.train()
    run = tmp_path / "round"
    assert last_whole_checkpoint(run) == str(run / "checkpoint-3")
    (run / "checkpoint-3" / MANIFEST_FILE).unlink()
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")


def test_a_sigterm_saves_and_the_round_goes_on_to_the_same_bits(make, tmp_path, monkeypatch):
    whole = make(Adapter(LORA), name="whole", max_steps=4)
    whole.train()
    settings = {"max_steps": 4, "enable_jit_checkpoint": True}
    stopped = make(Adapter(LORA), **settings)
    step = stopped.training_step

    def signalled(*args, **kwargs):
        if stopped.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(stopped, "training_step", signalled)
    with pytest.raises(Stopped):
        stopped.train()
    assert last_whole_checkpoint(tmp_path / "round") == str(tmp_path / "round/checkpoint-2")
    again = make(Adapter(LORA), **settings)
    again.train(resume_from_checkpoint=True)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert bits(one) == bits(other), name


def test_a_loss_that_is_no_number_ends_the_round(make):
    trainer = make(Adapter(LORA))
    for p in trainer.model.parameters():
        p.data.fill_(torch.inf if p.requires_grad else 1)
    with pytest.raises(HFTError, match="the loss is nan at step 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--method", "hft"], "method is hft, but lora trains an adapter"),
        (["--hft.ratio", "0.3"], "hft.ratio is given, but lora does not use it"),
        (["--hft.reselect=same"], "hft.reselect is given"),
        (["--lora.rank", "4"], "unknown key lora.rank"),
        (["--approach", "sequential", "--lora.r", "4"], "lora.r is given, but sequential does not use it"),
        (["--lora", "4"], "--lora is a section: set a key of it, such as --lora.r"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(words, complaint):
    with pytest.raises(HFTError, match=complaint):
        parse_continual(["--approach", "lora", *words], default_config=demo.CONTINUAL_RECIPE)


def test_a_method_in_the_file_is_refused_too_and_fft_is_not(tmp_path):
    path = tmp_path / "own.yaml"
    for method in ("hft", "fft"):
        path.write_text(f"model: demo\noutput_dir: x\nbenchmark: demo\napproach: o_lora\nmethod: {method}\n")
        if method == "hft":
            with pytest.raises(HFTError, match="method is hft, but o_lora trains an adapter"):
                parse_continual(["--config", str(path), "--sft.use_cpu", "true", "--max_new_tokens", "8"])
        else:
            parse_continual(["--config", str(path), "--sft.use_cpu", "true", "--max_new_tokens", "8"])


def test_what_a_model_or_a_launch_can_not_have_is_found_before_training(base, monkeypatch, tmp_path):
    def stage(**lora):
        args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
        data = DataArguments("rows.json")
        return Round("r", ModelArguments(str(base)), data, args, None, adapter=Adapter(LoRAArguments(**lora)))

    checked(stage())
    checked(stage(target_modules=["self_attn.q_proj", "embed_tokens"]))
    for names, wrong in (
        (["query"], "query"),
        (["q_proj", "vproj"], "vproj"),
        (["all-linear", "q_proj"], "all-linear"),
    ):
        with pytest.raises(
            HFTError, match=f"lora.target_modules names '{wrong}', which LlamaForCausalLM does not have"
        ):
            checked(stage(target_modules=names))
    for wrong in ({"r": 0}, {"lora_dropout": 1.5}):
        with pytest.raises(HFTError, match="the adapter of section lora cannot be set up: "):
            checked(stage(**wrong))
    with pytest.raises(HFTError, match=r"\['lm_head'\] reaches the head or a tied embedding: leave them out"):
        checked(stage(target_modules=["lm_head"]))
    tiny_llama(64, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tied = stage(target_modules=["embed_tokens"])
    with pytest.raises(HFTError, match=r"\['embed_tokens'\] reaches the head or a tied embedding"):
        checked(dataclasses.replace(tied, model=ModelArguments(str(tmp_path / "tied"))))
    made = stage()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(HFTError, match="this is launched with FSDP"):
        checked(made)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    made.args.deepspeed_plugin = object()
    with pytest.raises(HFTError, match="this is launched with DeepSpeed"):
        checked(made)


@pytest.fixture(scope="module")
def tasks(base, tmp_path_factory):
    """A folder with a model and two tiny tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("One", "Two"):
        for split, count in (("train", 16), ("test", 2)):
            pairs = [Row(f"Where does {name} {number} live?\n", f"In {number % 3}.") for number in range(count)]
            write_rows(folder / name / f"{split}.json", pairs)
    lines = "".join(f"  - {{name: {name}, metric: accuracy, epochs: 1}}\n" for name in ("One", "Two"))
    (folder / "tasks.yaml").write_text(f"tasks:\n{lines}")
    (folder / "kept.jsonl").write_text('{"prompt": "Where does One 1 live?"}')
    return folder


@pytest.fixture
def words(tasks, base):
    return [
        *started_from(base, demo.CONTINUAL_RECIPE), "--benchmark", tasks, "--sft.save_steps", 1, "--sft.per_device_train_batch_size", 8,
        "--max_new_tokens", 2, "--sft.disable_tqdm", "true",
        "--retention.prompts", tasks / "kept.jsonl",
    ]  # fmt: skip


def left(output):
    wanted = {"model.safetensors", "adapter_model.safetensors", "scores.json"}
    paths = [path for path in output.rglob("*") if path.name in wanted and "checkpoint-" not in str(path)]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def test_a_killed_round_ends_in_the_same_bytes_and_two_processes_in_nearly_the_same(words, tmp_path):
    """O-LoRA, whose second round needs the first one's adapter."""
    words = [*words, "--approach", "o_lora"]
    whole = Run(tmp_path / "whole.log", "continual", *words, "--output_dir", tmp_path / "whole")
    whole.finish()
    scores = json.loads((tmp_path / "whole/scores.json").read_text())
    assert scores["method"] is None
    assert [planned["selection_digest"] for planned in scores["rounds"]] == [None, None]
    assert all(0 < planned["share"]["model"] < 0.5 for planned in scores["rounds"])
    assert len(left(tmp_path / "whole")) == 5

    where = "*/round-2/checkpoint-2/hft_checkpoint.json"
    killed = [*words, "--output_dir", tmp_path / "killed"]
    run = Run(tmp_path / "killed.log", "continual", *killed, before=faults.at_write, given=("os.rename", where))
    assert run.wait() == [-signal.SIGKILL], run.output()[-3000:]
    Run(tmp_path / "again.log", "continual", *killed).finish()
    assert left(tmp_path / "killed") == left(tmp_path / "whole")
    # It did go on in the middle of the round
    assert json.loads((tmp_path / "killed/round-2/stage.json").read_text())["record"]["resumed_from_step"] == 1

    two = [*words, "--sft.per_device_train_batch_size", 4, "--output_dir", tmp_path / "two"]
    Run(tmp_path / "two.log", "continual", *two, processes=2).finish()
    for number in (1, 2):
        one, both = (load_file(tmp_path / name / f"round-{number}" / WEIGHTS) for name in ("whole", "two"))
        for name in one:
            torch.testing.assert_close(one[name], both[name], rtol=0, atol=1e-5)


def test_a_run_from_the_command_line(words, base, tmp_path, monkeypatch, capsys):
    """Its scores and report, and other settings in the same folder."""
    monkeypatch.chdir(ROOT)

    def recipe(*more):
        flags = map(str, [*words, "--approach", "lora", "--output_dir", tmp_path / "c", *more])
        monkeypatch.setattr(sys, "argv", ["recipes/continual.py", *flags])
        try:
            runpy.run_path("recipes/continual.py", run_name="__main__")
        except SystemExit as stop:
            return stop.code
        return 0

    before = (base / "model.safetensors").read_bytes()
    assert recipe() == 0
    assert (base / "model.safetensors").read_bytes() == before
    scores = json.loads((tmp_path / "c/scores.json").read_text())
    assert [len(row) for row in scores["matrix"]] == [1, 2]
    # The second round trains the adapter of the first one further, but its base is the model without an adapter
    history = json.loads((tmp_path / "c/round-2/stage.json").read_text())["record"]["history"]
    kept = [row["retention/base_kl"] for row in history if "retention/base_kl" in row]
    assert kept[0] == pytest.approx(scores["retention"]["round-1"]["base_kl"])
    assert kept[0] > 0
    assert (tmp_path / "c/report.md").read_text().count("lora: ") == 0
    assert "lora, from" in (tmp_path / "c/report.md").read_text()

    # The second round's model is the base with the second round's adapter, which went on from the first one's
    merge(str(base), tmp_path / "c/round-2" / ADAPTER_FOLDER, dtype="float32").save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (
        tmp_path / "c/round-2/model.safetensors"
    ).read_bytes()
    assert left(tmp_path / "c")[f"round-1/{WEIGHTS}"] != left(tmp_path / "c")[f"round-2/{WEIGHTS}"]

    assert scores["method"] is None

    after = left(tmp_path / "c")
    capsys.readouterr()
    assert recipe("--lora.r", "4") == 2
    assert "lora.r 8 there, 4 here" in capsys.readouterr().err
    assert recipe("--lora.o_lora_lambda", "0.1") == 2
    assert "lora.o_lora_lambda is given, but lora does not use it" in capsys.readouterr().err
    assert recipe() == 0
    assert left(tmp_path / "c") == after

"""sft.py and dpo.py under ZeRO-2 and ZeRO-3 in two real processes, with log-probs of the reference beforehand too."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tulu_row, ultrafeedback_row
from launching import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hft_trl import demo

pytestmark = pytest.mark.deepspeed

QUICK = ["--max_steps", 2, "--logging_steps", 1, "--per_device_train_batch_size", 4]
PRECOMPUTE = ["--precompute_ref_log_probs", "true"]
BEFOREHAND = "reference: its log-probs were computed before training"


def rows(path: Path, row) -> Path:
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(32)))
    return path


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def run(request, tmp_path_factory) -> tuple[Path, str]:
    """
    SFT, DPO, the same with log-probs beforehand, and with those of another model of SFT.

    One launch, one file of pairs.
    """
    folder = tmp_path_factory.mktemp("single")
    (folder / "watch").mkdir()
    texts, pairs = rows(folder / "sft.jsonl", tulu_row), rows(folder / "dpo.jsonl", ultrafeedback_row)

    def recipe(stage, start, data, name, *flags):
        where = ["--model_name_or_path", start, "--dataset_name", data, "--output_dir", folder / name]
        return [f"recipes/{stage}.py", *where, *QUICK, *flags]

    result = launch(
        request.param,
        "watched.py",
        *(*recipe("sft", demo.MODEL, texts, "sft", "--learning_rate", 1e-2), "+"),
        *(*recipe("sft", demo.MODEL, texts, "sft-slow", "--learning_rate", 1e-3), "+"),
        *(*recipe("dpo", folder / "sft", pairs, "dpo"), "+"),
        *(*recipe("dpo", folder / "sft", pairs, "beforehand", *PRECOMPUTE), "+"),
        *recipe("dpo", folder / "sft-slow", pairs, "after-slow", *PRECOMPUTE),
        WATCH=folder / "watch",
    )
    return folder, result.stdout + result.stderr, request.param


def record(folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    assert report["num_processes"] == 2
    return report["stages"][0]


@pytest.mark.parametrize(
    ("name", "start"), [("sft", None), ("dpo", "sft"), ("beforehand", "sft"), ("after-slow", "sft-slow")]
)
def test_each_recipe_trains_a_half_in_two_processes_and_leaves_a_whole_model(run, name, start):
    folder, _, zero_stage = run
    facts = [json.loads((folder / "watch" / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    assert {(fact["num_processes"], fact["zero_stage"]) for fact in facts} == {(2, zero_stage)}
    assert record(folder / name)["frozen_unchanged"] is True
    before = load_file((folder / start if start else demo.MODEL) / "model.safetensors")
    after = load_file(folder / name / "model.safetensors")
    frozen = json.loads((folder / name / "hft_selection.json").read_text())["frozen"]
    assert frozen
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in frozen)
    _, loading = AutoModelForCausalLM.from_pretrained(folder / name, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


def test_log_probs_beforehand_train_what_a_reference_in_memory_trains(run):
    folder, output, _ = run
    assert output.count(BEFOREHAND) == 2
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("beforehand", "dpo"))
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-6) for name in ours)
    losses = [
        [row["loss"] for row in record(folder / name)["history"] if "loss" in row] for name in ("beforehand", "dpo")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_log_probs_of_one_model_are_not_taken_for_those_of_another(run):
    """TRL names its cache after the model's bytes, of which ZeRO-3 shows it none."""
    folder, *_ = run
    digests = [
        {json.loads((folder / "watch" / f"{name}-{rank}.json").read_text())["model_hash"] for rank in range(2)}
        for name in ("beforehand", "after-slow")
    ]
    assert [len(of_both_ranks) for of_both_ranks in digests] == [1, 1]
    assert digests[0] != digests[1]
    for name in ("dpo", "beforehand", "after-slow"):
        assert record(folder / name)["first_loss"] == pytest.approx(0.6931, abs=1e-4)

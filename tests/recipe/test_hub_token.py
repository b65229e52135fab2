"""A token for the hub reaches the hub's library, and no file that a run leaves."""

import os
import runpy
import sys

import pytest
from conftest import started_from, write_rows
from huggingface_hub import get_token
from trl import SFTConfig
from warm import ROOT

from hft_trl import HFTError, demo
from hft_trl.continual.tasks import Row
from hft_trl.recipe.arguments import tokens_to_environment

pytestmark = pytest.mark.long

TOKEN = "hf_NOTSECRET"
QUICK = ["--sft.max_steps", 1, "--sft.save_steps", 1, "--sft.report_to", "tensorboard"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """As it was, when a test ends."""
    monkeypatch.setenv("HF_TOKEN", "of the machine")


def config(tmp_path, **settings):
    return SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize("settings", [{"hub_token": TOKEN}, {"model_init_kwargs": {"token": TOKEN, "dtype": "auto"}}])
def test_a_token_is_moved_to_where_the_hubs_library_looks(tmp_path, settings):
    args = config(tmp_path, **settings)
    tokens_to_environment(args)
    assert get_token() == TOKEN
    assert TOKEN not in str(vars(args))
    assert args.model_init_kwargs in (None, {"dtype": "auto"})


def test_without_a_token_nothing_changes(tmp_path):
    args = config(tmp_path, model_init_kwargs={"token": True})
    tokens_to_environment(args)
    assert args.model_init_kwargs == {"token": True}
    assert get_token() == "of the machine"


def test_two_tokens_are_refused(tmp_path):
    with pytest.raises(HFTError, match=r"hub_token and model_init_kwargs\.token are two different tokens") as error:
        tokens_to_environment(config(tmp_path, hub_token="hf_A", model_init_kwargs={"token": "hf_B"}))
    assert "hf_" not in str(error.value)


def flat(tmp_path):
    (tmp_path / "flat.yaml").write_text(
        f"model_init_kwargs:\n  token: {TOKEN}\nhub_token: {TOKEN}\nenv:\n  HF_TOKEN: {TOKEN}\n"
    )
    words = ["--config", tmp_path / "flat.yaml", "--model_name_or_path", "demo", "--dataset_name", "demo"]
    return "sft", [*words, *[str(word).replace("sft.", "") for word in QUICK], "--hub_token", TOKEN]


def sections(tmp_path):
    words = ["--sft.hub_token", TOKEN, f"--dpo.hub-token={TOKEN}", *QUICK, "--dpo.max_steps", 1, "--dpo.save_steps", 1]
    more = ["--dpo.model_init_kwargs", f'{{"token": "{TOKEN}"}}', "--dpo.report_to", "tensorboard"]
    return "sft_then_dpo", [*started_from(demo.MODEL.parent / "model"), *words, *more]


def continual(tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / "tasks" / "A" / f"{split}.json", [Row("Question: a\nAnswer: ", "b")] * 4)
    (tmp_path / "tasks" / "tasks.yaml").write_text("tasks:\n  - {name: A, metric: accuracy, epochs: 1}\n")
    words = [*started_from(demo.MODEL, demo.CONTINUAL_RECIPE), "--benchmark", tmp_path / "tasks", *QUICK]
    return "continual", [*words, f"--sft.hub_token={TOKEN}", "--max_new_tokens", 4]


@pytest.mark.parametrize("make", [flat, sections, continual])
def test_no_file_of_a_run_and_no_line_of_its_output_holds_the_token(make, tmp_path, monkeypatch, capfd):
    """As text, in the pickle of transformers' arguments, and in a tracker's events."""
    name, flags = make(tmp_path)
    output = tmp_path / "run"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *map(str, flags), "--output_dir", str(output)])
    runpy.run_path(f"recipes/{name}.py", run_name="__main__")
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {"stage.json", "training_args.bin", "README.md", "report.md"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err
    assert os.environ["HF_TOKEN"] == TOKEN
    if name != "continual":
        assert "***" in (output / "report.md").read_text()


def test_an_error_that_quotes_a_flag_hides_its_value(monkeypatch, capsys):
    words = ["recipes/sft_then_dpo.py", f"--wrong.hub_token={TOKEN}", "--output_dir", "unused"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        runpy.run_path("recipes/sft_then_dpo.py", run_name="__main__")
    error = capsys.readouterr().err
    assert "unknown key wrong.hub_token" in error
    assert "NOTSECRET" not in error

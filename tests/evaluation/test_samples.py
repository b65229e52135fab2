"""Outputs for AlpacaEval: the format of that project, the replies of the model, and mistakes in one line."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from hft_trl import HFTError
from hft_trl.chat import chat
from hft_trl.cli import app
from hft_trl.evaluation.run import sample_answers

PROMPTS = [
    {"instruction": "Where?", "output": "reference", "generator": "text_davinci_003", "dataset": "helpful_base"},
    {"instruction": "Where does a person live?", "output": "reference", "generator": "text_davinci_003", "dataset": "koala"},
    {"instruction": "Sag: äöü"},
]  # fmt: skip


def generate(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_the_outputs_are_the_models_replies_in_order(base, tmp_path):
    prompts, outputs = tmp_path / "alpaca_eval.json", tmp_path / "new" / "outputs.json"
    prompts.write_text(json.dumps(PROMPTS))
    flags = ["--alpaca-eval", "--prompts", prompts, "--max-new-tokens", 8, "--output", outputs]
    result = generate(base, *flags, "--generator", "mine", "--batch-size", 1)
    assert result.exit_code == 0, result.output
    rows = json.loads(outputs.read_text(encoding="utf-8"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    replies = chat(model, tokenizer, [row["instruction"] for row in PROMPTS], 8)
    assert rows == [
        {
            "instruction": prompt["instruction"],
            "output": reply,
            "generator": "mine",
            "dataset": prompt.get("dataset", ""),
        }
        for prompt, reply in zip(PROMPTS, replies, strict=True)
    ]
    assert any(replies)
    once = outputs.read_bytes()
    assert generate(base, *flags, "--generator", "mine").exit_code == 0
    assert outputs.read_bytes() == once
    assert generate(base, *flags, "--limit", 1).exit_code == 0
    assert [row["generator"] for row in json.loads(outputs.read_text())] == [str(base)]


def test_sample_answers_are_the_models_own_and_need_no_padding_token(base, tmp_path, monkeypatch):
    """They equal those of `chat`, in the order of the prompts, and a missing model is named."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    prompts = [row["instruction"] for row in PROMPTS]
    expected = chat(model, tokenizer, prompts, 8)
    tokenizer.pad_token = None
    model.save_pretrained("saved")
    tokenizer.save_pretrained("saved")
    assert sample_answers("saved", prompts, 8) == expected
    assert any(expected)
    with pytest.raises(HFTError, match=r"model folder '\./gone' does not exist"):
        sample_answers("./gone", prompts)


def test_a_model_that_was_copied_in_part_is_named(base, tmp_path):
    folder = tmp_path / "part"
    shutil.copytree(base, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    result = generate(folder, "--prompts", "Where?")
    assert result.exit_code == 2
    assert "model.safetensors is missing or incomplete" in result.stderr


def test_a_reply_ends_where_the_model_says_that_a_turn_ends(base):
    """Such as Gemma's, whose tokenizer names the end of a text only."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    (reply,) = chat(model, tokenizer, ["Where?"], 8)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    (shorter,) = chat(model, tokenizer, ["Where?"], 8)
    assert reply.startswith(shorter)
    assert len(shorter) < len(reply)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read as JSON: No such file"),
        ("{", "cannot be read as JSON: Expecting property name"),
        ("{}", "must be a JSON list"),
        ("[]", "must be a JSON list"),
        ('[{"instruction": "a"}, {"question": "b"}]', "row 1"),
        ('[{"instruction": 3}]', "row 0"),
    ],
)
def test_prompts_of_another_kind_are_one_line(base, tmp_path, content, words):
    prompts = tmp_path / "prompts.json"
    if content is not None:
        prompts.write_text(content)
    result = generate(base, "--alpaca-eval", "--prompts", prompts, "--output", tmp_path / "out.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert not (tmp_path / "out.json").exists()


def test_an_output_that_can_not_be_written_is_said_before_a_model_is_asked(base, tmp_path, monkeypatch):
    prompts = tmp_path / "alpaca_eval.json"
    prompts.write_text(json.dumps(PROMPTS))
    monkeypatch.setattr("hft_trl.evaluation.run.find_model", lambda *_: pytest.fail("the model was asked"))
    result = generate(base, "--alpaca-eval", "--prompts", prompts, "--output", tmp_path)
    assert result.exit_code == 2
    assert "which cannot be written (Is a directory): choose another file" in result.output
    assert generate(base, "--alpaca-eval", "--prompts", prompts, "--dtype", "banana").exit_code == 2


def test_a_reply_ends_with_the_models_positions(tokenizer):
    """GPT-2 has no position beyond them, and would fail."""
    torch.manual_seed(0)
    settings = {"n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **settings))
    model.generation_config.eos_token_id = None
    (reply,) = chat(model, tokenizer, ["Where?"], 2048)
    assert isinstance(reply, str)
    with pytest.raises(HFTError, match="tokens, and the model 48 positions"):
        chat(model, tokenizer, ["Where does a person live? " * 20], 8)


def test_models_are_asked_side_by_side(base, tmp_path):
    """Each question, below it each model with its greedy answer; as JSON the same."""
    prompts = ["Where does [Ada] live?", "Where?"]
    flags = [base, "demo", "--prompts", prompts[0], "--prompts", prompts[1], "--max-new-tokens", 8]
    answers = {str(model): sample_answers(str(model), prompts, 8) for model in (base, "demo")}
    result = generate(*flags, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"prompts": prompts, "answers": answers}
    shown = generate(*flags).stdout
    assert shown.index(prompts[0]) < shown.index("demo") < shown.index(prompts[1])
    words = shown.split()
    assert all(word in words for answer in answers["demo"] for word in answer.split())
    assert not (tmp_path / "runs").exists()


def test_a_file_of_prompts_needs_the_format_and_the_format_one_file_and_one_model(base, tmp_path):
    two = ["--prompts", "a", "--prompts", "b", "--alpaca-eval"]
    for flags in (["--prompts", tmp_path], two, ["--prompts", "a", "--limit", 1]):
        result = generate(base, *flags)
        assert result.exit_code == 2
        assert "--alpaca-eval" in result.stderr

"""Small models and data that every test may use. Nothing here or in the tests reaches the network."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Only `make test-gpu` sees a GPU, and one of them
os.environ["CUDA_VISIBLE_DEVICES"] = (
    os.environ.get("CUDA_VISIBLE_DEVICES", "0") if "HFT_TEST_GPU" in os.environ else ""
)
os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that tests start, since tests run side by side

from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset, are_progress_bars_disabled
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, SFTConfig

from hft_trl import demo, recipe


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _switches_of_the_process():
    """A test that leaves a switch of the process turned fails itself, not whichever test comes after it."""

    def switches() -> dict:
        return {
            "progress bars of datasets": are_progress_bars_disabled(),
            "working directory": Path.cwd(),
            "default dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
        }

    before = switches()
    yield
    assert switches() == before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """A failure whose text no encoding can hold is shown, and does not end the run."""
    report = yield
    if report.longrepr is not None and not isinstance(report.longrepr, tuple):
        text = str(report.longrepr)
        if text != (shown := text.encode(errors="replace").decode()):
            report.longrepr = shown
    return report


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Where does Ada live? Ada lives in Rome."] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


PATIENCE = 1800
"""Seconds after which a process of a test counts as hanging. A busy machine may need most of them."""

QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
}
"""Arguments of a trainer that takes a few steps and leaves nothing behind."""


def tiny_llama(vocab_size: int, **overrides) -> LlamaForCausalLM:
    """A Llama with grouped-query attention, small enough to train in a test."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer) -> Path:
    """Folder of a tiny base model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


parse_recipe = partial(recipe.parse_recipe, stages={"sft": SFTConfig, "dpo": DPOConfig})
"""The parser with the stages of `recipes/sft_then_dpo.py`."""


def started_from(model: Path | str, config: Path = demo.RECIPE) -> list[str]:
    """Flags for another model than the demo's with the demo's settings, which a recipe takes for no other unasked."""
    return ["--config", str(config), "--model", str(model)]


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write prompts and answers in TRACE's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"prompt": prompt, "answer": answer} for prompt, answer in rows]), encoding="utf-8")


def one_line(error: pytest.ExceptionInfo) -> str:
    """The message of an error, which takes one line."""
    message = str(error.value)
    assert "\n" not in message
    return message


def tulu_row(number: int) -> dict:
    """A row in the schema of `allenai/tulu-v2-sft-mixture`."""
    return {
        "dataset": "flan_v2",
        "id": f"flan_v2_{number}",
        "messages": [
            {"role": "user", "content": f"Where does person {number} live?"},
            {"role": "assistant", "content": f"In city {number % 7}."},
        ],
    }


def ultrafeedback_row(number: int) -> dict:
    """A row in the schema of `HuggingFaceH4/ultrafeedback_binarized`."""
    prompt = f"Where does person {number} live?"
    user = {"content": prompt, "role": "user"}
    chosen = [user, {"content": f"In city {number % 7}.", "role": "assistant"}]
    rejected = [user, {"content": f"In the city of {(number + 1) % 7}, I think.", "role": "assistant"}]
    return {
        "prompt": prompt,
        "prompt_id": f"{number:064x}",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 8.0,
        "score_rejected": 6.5,
    }


@pytest.fixture(scope="session")
def tulu() -> Dataset:
    return Dataset.from_list([tulu_row(number) for number in range(32)])


@pytest.fixture(scope="session")
def ultrafeedback() -> Dataset:
    return Dataset.from_list([ultrafeedback_row(number) for number in range(32)])

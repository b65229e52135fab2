"""Fingerprints tell tensors apart bit by bit; differences of saved models are exact."""

import hashlib
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hft_trl.errors import HFTError
from hft_trl.saved_models.diff import Change, change
from hft_trl.weights import (
    CHUNK,
    PIECE,
    combined_digest,
    fingerprint,
    fingerprints,
    rounds,
    weight_files,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.data())
def test_a_fingerprint_is_equal_exactly_when_every_bit_is(dtype, shape, data):
    """Equal copies agree; one flipped bit, another shape or another dtype does not."""
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor) != fingerprint(tensor.unsqueeze(0))
    others = [other for other in DTYPES if other is not dtype]
    assert fingerprint(tensor) != fingerprint(tensor.to(data.draw(st.sampled_from(others))))
    if tensor.numel():
        flipped = tensor.clone().reshape(-1).view(torch.uint8)
        flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1
        assert fingerprint(tensor) != fingerprint(flipped.view(dtype).reshape(shape))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(DTYPES), st.data())
def test_any_flipped_bit_of_any_piece_changes_the_fingerprint_of_that_tensor_alone(dtype, data):
    """However many tensors are hashed side by side."""
    tensors = {str(number): torch.zeros(3 + number, dtype=dtype) for number in range(20)}
    tensors["large"] = torch.zeros(PIECE + 1, dtype=dtype)
    before = fingerprints(tensors.items())
    assert before == {name: fingerprint(tensor) for name, tensor in tensors.items()}
    name = data.draw(st.sampled_from(["0", "19", "large"]))
    flat = tensors[name].view(torch.uint8)
    last = len(flat) - 1
    place = data.draw(st.one_of(st.integers(0, last), st.sampled_from([0, last, last - dtype.itemsize])))
    flat[place] ^= 1 << data.draw(st.integers(0, 7))
    after = fingerprints(tensors.items())
    assert {key for key in before if before[key] != after[key]} == {name}


def test_a_fingerprint_does_not_depend_on_the_size_of_the_pieces(monkeypatch):
    """It is the SHA-256 of type, shape and bytes, as in the files of earlier versions."""
    tensor = torch.arange(1000.0).reshape(10, 100)
    expected = hashlib.sha256(b"torch.float32 (10, 100) " + tensor.numpy().tobytes()).hexdigest()
    for size in (1, 7, 1000, PIECE):
        monkeypatch.setattr("hft_trl.weights.PIECE", size)
        assert fingerprint(tensor) == expected


def test_a_transposed_view_is_fingerprinted_by_its_values():
    tensor = torch.arange(6.0).reshape(2, 3)
    assert fingerprint(tensor.T) == fingerprint(tensor.T.contiguous())
    assert fingerprint(tensor.T) != fingerprint(tensor)


def test_a_models_digest_depends_on_names_and_values_not_on_order():
    a, b = torch.ones(2), torch.zeros(2)
    digests = fingerprints([("a", a), ("b", b)])
    assert combined_digest(digests) == combined_digest(fingerprints([("b", b), ("a", a)]))
    assert combined_digest(digests) != combined_digest(fingerprints([("a", b), ("b", a)]))


def sharded(folder, tensors):
    """A model saved in one shard per tensor, with its index."""
    folder.mkdir()
    files = {name: f"model-{i:05d}-of-{len(tensors):05d}.safetensors" for i, name in enumerate(tensors, 1)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return str(folder)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0, 1, 2, 5]), st.data())
def test_a_change_counts_the_values_that_differ_in_a_bit(size, data):
    """Also in the second piece of a large tensor, and also a zero that only changed its sign."""
    size += data.draw(st.sampled_from([0, CHUNK]))
    before = torch.zeros(size)
    after = before.clone()
    places = data.draw(st.sets(st.integers(0, size - 1), max_size=3)) if size else set()
    for number, place in enumerate(places):
        after[place] = (-0.0, 3.0, 4.0)[number]
    assert change(before, after) == Change([0.0, 0.0, 3.0, 5.0][len(places)], 0.0, len(places), size)


def test_a_change_of_type_alone_is_none_where_the_wider_type_holds_the_same_values():
    narrow = torch.tensor([1.5, -2.0, float("inf"), float("nan")], dtype=torch.bfloat16)
    assert change(narrow, narrow.float()).moved == 0
    assert change(narrow.float(), narrow).moved == 0
    assert change(torch.tensor([0.1, 0.5]), torch.tensor([0.1, 0.5], dtype=torch.bfloat16)).moved == 1


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from([0, 3, PIECE, PIECE + 1]))
def test_a_fingerprint_in_another_type_is_that_of_the_converted_tensor(dtype, other, size):
    tensor = torch.arange(size).remainder(100).to(dtype)
    assert fingerprint(tensor, other) == fingerprint(tensor.to(other))


@pytest.mark.parametrize("own", DTYPES[:3])
@pytest.mark.parametrize("other", DTYPES[:3])
def test_a_type_rounds_another_where_a_value_does_not_come_back(own, other):
    """The smallest step above 1 and a value near the end of the range."""
    values = torch.tensor([1 + torch.finfo(own).eps, torch.finfo(own).max / 2], dtype=own)
    assert rounds(own, other) == (not torch.equal(values.to(other).to(own), values))
    assert not rounds(None, other)


def test_a_single_file_goes_before_an_index_as_it_does_in_from_pretrained(tmp_path):
    folder = tmp_path / "model"
    sharded(folder, {"a": torch.ones(1), "b": torch.ones(1)})
    save_file({"c": torch.ones(1)}, folder / "model.safetensors")
    assert weight_files(str(folder)) == {"c": folder / "model.safetensors"}


def test_a_folder_without_safetensors_and_a_torn_file_are_named(tmp_path):
    with pytest.raises(HFTError, match=r"holds no model\.safetensors"):
        weight_files(str(tmp_path))
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    assert weight_files(str(tmp_path)) == {"a": tmp_path / "model.safetensors"}
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(HFTError, match=r"model\.safetensors is missing or incomplete"):
        weight_files(str(tmp_path))


def test_a_file_that_an_index_lists_and_that_is_torn_or_missing_is_named(tmp_path):
    folder = sharded(tmp_path / "model", {"a": torch.ones(1000), "b": torch.ones(1)})
    file = weight_files(folder)["a"]
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1]), file.unlink):
        damage()
        with pytest.raises(HFTError, match=f"{file.name} is missing or incomplete"):
            weight_files(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"weight_map": {"a": "../../other.safetensors"}}',
            r"says that a is in '\.\./\.\./other.safetensors', which is no file beside it",
        ),
        ('{"weight_map": {"a": "/etc/passwd"}}', "says that a is in '/etc/passwd', which is no file beside it"),
        ('{"weight_map": {"a": ".."}}', r"says that a is in '\.\.', which is no file beside it"),
        ('{"weight_map": {"a": 7}}', "says that a is in 7, which is no file beside it"),
        ('{"weight_map": ["a"]}', "cannot be read .its 'weight_map' is"),
        ("[]", "cannot be read .it holds list instead of an object"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read .it is nested too deeply"),
    ],
)
def test_an_index_that_is_broken_or_leads_out_of_the_folder_is_refused(tmp_path, content, said):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(HFTError, match=said):
        weight_files(str(tmp_path))

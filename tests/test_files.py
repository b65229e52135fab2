"""Files are written whole or not at all, and only a disk's refusals are put down to the disk."""

import contextlib
import errno
import json
import os
import resource

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import save_file

from hft_trl import HFTError
from hft_trl.errors import exit_on_user_error
from hft_trl.files import check_output, replacing, write_json, write_text, writing


@pytest.mark.parametrize("fails", ["os.fsync", "pathlib.Path.replace"])
def test_a_file_that_can_not_be_written_is_as_it_was(tmp_path, monkeypatch, fails):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_file_of_any_kind_takes_the_old_ones_place_only_when_it_is_whole(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), replacing(page) as new:
        new.write_text("half of")
        assert page.read_text() == "old"
        raise KeyboardInterrupt
    assert page.read_text() == "old"
    with replacing(page) as new:
        new.write_text("new")
    assert page.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_what_a_kill_left_beside_a_file_is_written_over(tmp_path):
    (tmp_path / ".a.json").write_text("{")
    write_json(tmp_path / "a.json", {"new": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"new": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_errors_of_the_hub_and_the_network_are_not_put_down_to_the_disk(tmp_path):
    """They are OSErrors too."""
    for error in (ConnectionError("503 Service Unavailable"), OfflineModeIsEnabled("offline"), TimeoutError("slow")):
        with pytest.raises(type(error)) as raised, writing(tmp_path):
            raise error
        assert raised.value is error


@pytest.fixture
def small_files():
    """No file can grow beyond a kilobyte: the kernel refuses the rest, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "save",
    [
        lambda path: save_file({"w": torch.ones(10000)}, path),
        lambda path: torch.save({"w": torch.ones(10000)}, path),
        lambda path: path.write_text("x" * 10000),
    ],
    ids=["safetensors", "torch", "python"],
)
def test_a_file_that_is_cut_short_is_one_error_whoever_writes(save, tmp_path, small_files):
    with pytest.raises(HFTError) as error, writing(tmp_path / "run" / "checkpoint-3"):
        save(tmp_path / "file")
    assert f"{tmp_path / 'run' / 'checkpoint-3'} cannot be written (" in str(error.value)
    assert "MB are free there): make room" in str(error.value)


def test_other_errors_are_left_alone(tmp_path):
    for error in (RuntimeError("the frozen parameter moved"), HFTError("ratio"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error


def test_an_output_is_checked_before_the_work_and_nothing_is_left_behind(tmp_path):
    """Missing folders are no obstacle; a file, a folder in place of a file, and odd names are rejected."""
    check_output("--output", tmp_path / "new" / "out")
    check_output("--plot", tmp_path / "new" / "diff.png", is_file=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    (tmp_path / "file").write_text("kept")
    for path, is_file in (
        ("file", False),
        ("file/diff.png", True),
        ("new", True),
        ("a\0b", False),
        ("x" * 999, False),
    ):
        with pytest.raises(HFTError, match=r"--flag is .*, which cannot be written \(.*\): choose another"):
            check_output("--flag", tmp_path / path, is_file)
    assert (tmp_path / "file").read_text() == "kept"
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "file"}


def test_half_a_surrogate_pair_is_written_as_an_escape(tmp_path, capsys):
    """JSON may hold one, in a damaged config for example: a report or an error that quotes it is still written."""
    write_text(tmp_path / "report.md", "a \ud800 b")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "a \\ud800 b"
    write_json(tmp_path / "rows.json", {"a": "\ud800"}, ensure_ascii=False)
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")) == {"a": "\ud800"}
    with pytest.raises(SystemExit), exit_on_user_error():
        raise HFTError("model 'x' is a \ud800, which is no causal LM.")
    assert capsys.readouterr().err == "error: model 'x' is a \\ud800, which is no causal LM.\n"

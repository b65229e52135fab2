"""Log-probs of the reference beforehand: their cache is one for all processes."""

import pytest
from datasets import Dataset, disable_caching, enable_caching

from hft_trl import HFTError
from hft_trl.trainers.dpo import seen_by_all


def test_one_process_keeps_its_rows_where_they_are(tmp_path):
    rows = Dataset.from_list([{"a": 1}])
    assert seen_by_all(rows, tmp_path / "rows") is rows
    assert not (tmp_path / "rows").exists()


def test_several_processes_without_datasets_cache_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("hft_trl.trainers.dpo.PartialState", lambda: type("State", (), {"num_processes": 2}))
    disable_caching()
    try:
        with pytest.raises(HFTError, match="caching is off"):
            seen_by_all(Dataset.from_list([{"a": 1}]), tmp_path)
    finally:
        enable_caching()

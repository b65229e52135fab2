"""benchmarks/fingerprints.py: every way gives the digests of the package, and each round times all of them."""

import sys

import pytest
import torch
from warm import ROOT

from hft_trl.weights import fingerprints

sys.path.insert(0, str(ROOT / "benchmarks"))

import fingerprints as benchmark

TENSORS = [(str(number), torch.arange(5.0 + number).to(torch.bfloat16)) for number in range(9)]


@pytest.mark.parametrize("way", benchmark.WAYS)
def test_every_way_gives_the_digests_of_the_package(way):
    expected = fingerprints(TENSORS)
    assert benchmark.WAYS[way](TENSORS) == expected
    assert fingerprints(TENSORS) == expected  # nothing stays replaced


def test_each_round_times_every_way_and_other_digests_are_an_error(monkeypatch):
    seconds = benchmark.measure(TENSORS, 2)
    assert {way: len(each) for way, each in seconds.items()} == dict.fromkeys(benchmark.WAYS, 2)
    monkeypatch.setitem(benchmark.WAYS, "now", lambda tensors: {})
    with pytest.raises(RuntimeError, match="now gives other digests"):
        benchmark.measure(TENSORS, 1)

"""Retention under DDP and FSDP2: two processes share the rows and find the figures of one process."""

from pathlib import Path

import pytest
from launch import finish, on_cpu, seen, start
from retain import ROWS, train

PROGRAM = Path(__file__).parent / "retain.py"


def figures(log: list[dict]) -> list[list[float]]:
    return [
        [row[key] for key in ("step", "retention/text_loss", "retention/base_kl", "retention/facts")]
        for row in log
        if "retention/seconds" in row
    ]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The figures of one process, by stage."""
    output = tmp_path_factory.mktemp("alone")
    sft = train("sft", base, output)
    return {"sft": figures(sft), "dpo": figures(train("dpo", output / "sft", output))}


@pytest.mark.parametrize("config", ["cpu2.yaml", "fsdp2.yaml"])
def test_two_processes_find_the_figures_of_one(alone, base, tmp_path, config):
    finish(start(on_cpu(config, tmp_path), PROGRAM, base, tmp_path))
    for stage, expected in alone.items():
        ranks = seen(tmp_path, stage)
        assert len(ranks) == 2
        assert figures(ranks[0]) == figures(ranks[1])
        assert [row[0] for row in expected] == [0, 2, 4]
        assert all(len(rows) > 2 for rows in ROWS.values())  # so that both processes have a part
        for found, one in zip(figures(ranks[0]), expected, strict=True):
            assert found == pytest.approx(one, abs=1e-5)
    assert alone["sft"][0][2] == pytest.approx(0, abs=1e-6)
    assert alone["dpo"][0] == pytest.approx([0, *alone["sft"][-1][1:]], abs=1e-6)  # DPO is compared with the base too

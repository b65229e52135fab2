"""What a report tells of retention: from the log rows into the JSON, tables and pictures."""

import json
from html import unescape

import pytest
from conftest import one_line
from reports import RETENTION, report, stage

from hft_trl import HFTError
from hft_trl.report import Report
from hft_trl.report.plots import retention_figure
from hft_trl.report.record import retention_of
from hft_trl.report.sections import CAPTIONS
from hft_trl.report.tables import retention_grid
from hft_trl.report.views import report_markdown, report_page


def rows(*losses):
    loss = [{"step": step, "loss": 1.0} for step in range(len(losses))]
    kept = [{"step": 10 * n, "retention/text_loss": x, "retention/seconds": 0.5} for n, x in enumerate(losses)]
    return [*loss, *kept, {"step": 10, "train_loss": 1.0}]


def test_the_last_figures_of_each_stage_and_the_first_of_the_base_are_collected():
    found = retention_of([stage(history=rows(2.0, 2.5)), stage("dpo", history=rows(2.5, 2.25))])
    assert found == {
        "base": {"text_loss": 2.0},
        "sft": {"text_loss": 2.5},
        "dpo": {"text_loss": 2.25},
        "history": {
            "sft": [{"step": 0, "text_loss": 2.0, "seconds": 0.5}, {"step": 10, "text_loss": 2.5, "seconds": 0.5}],
            "dpo": [{"step": 0, "text_loss": 2.5, "seconds": 0.5}, {"step": 10, "text_loss": 2.25, "seconds": 0.5}],
        },
    }


def test_a_stage_without_a_meter_is_left_out_and_then_there_is_no_base():
    assert retention_of([stage(), stage("dpo")]) == {}
    assert list(retention_of([stage(), stage("dpo", history=rows(2.5))])) == ["dpo", "history"]


def test_a_report_of_before_still_loads_and_shows_nothing_of_it(tmp_path):
    path = report().save(tmp_path)
    content = json.loads(path.read_text())
    del content["retention"]
    path.write_text(json.dumps(content))
    found = Report.load(tmp_path)
    assert found.retention == {}
    assert retention_figure(found) is None
    assert "KL to the base" not in report_markdown(found, ["retention.png"]) + report_page(found)


@pytest.mark.parametrize(
    "damaged",
    [
        {"base": 3},
        {"base": {"facts": "all"}},
        {"history": [1]},
        {"history": {"sft": [{"step": "x"}]}},
        {"history": {"sft": 4}},
    ],
)
def test_damaged_figures_are_rejected_with_their_place(tmp_path, damaged):
    path = report().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"retention": damaged}))
    with pytest.raises(HFTError, match=r"report\.retention\.") as error:
        Report.load(tmp_path)
    one_line(error)


def test_the_table_has_differences_from_the_base_and_the_plot_a_panel_for_each_measure():
    found = report(retention=RETENTION)
    grid = retention_grid(found.retention)
    assert grid.rows == [
        ["base", "2.0000", "0.0000", "90.0"],
        ["sft", "2.5000 (+0.5000)", "0.2500", "80.0 (-10.0)"],
        ["dpo", "-", "0.5000", "85.0 (-5.0)"],
    ]
    panels = retention_figure(found).axes
    assert [axes.get_ylabel() for axes in panels] == grid.columns[1:]
    sft, dpo = panels[1].get_lines()
    assert list(sft.get_xdata()) == [0, 60]
    assert list(dpo.get_xdata()) == [60, 120]  # behind each other
    assert list(dpo.get_ydata()) == [0.25, 0.5]
    text = report_markdown(found, ["loss.png", "retention.png"])
    assert text.index("loss.png") < text.index("retention.png")
    assert CAPTIONS["retention.png"] in unescape(report_page(found))

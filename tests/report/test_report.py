"""Reports: the JSON holds every figure, and tables, text and pictures are made from it alone."""

import json
import math
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.container import BarContainer
from reports import ODD, moved, report, stage
from rich.console import Console

from hft_trl import demo
from hft_trl.errors import HFTError
from hft_trl.report import Report, StageRecord, UnitChange, environment, print_report, write_views
from hft_trl.report.layer_map import ASCII, layer_map, layer_picture
from hft_trl.report.movement import movement_figure, movement_grids
from hft_trl.report.plots import evaluation_figure, loss_figure, margin_figure
from hft_trl.report.tables import (
    Grid,
    change,
    duration,
    evaluation_grids,
    rich_table,
    size,
    stage_grid,
)
from hft_trl.report.views import report_markdown, report_page
from hft_trl.selection import Unit, find_units, select
from hft_trl.selection.shares import category_shares

STAGE_FIELDS = [
    "name",
    "method",
    "selection_digest",
    "share",
    "trainable_params",
    "total_params",
    "steps",
    "tokens",
    "tokens_per_second",
    "runtime_seconds",
    "peak_memory_bytes",
    "optimizer_state_bytes",
    "first_loss",
    "last_loss",
    "frozen_unchanged",
]


def test_saved_and_loaded_report_is_the_same(tmp_path):
    """What is loaded equals what was saved, and no temporary file stays behind."""
    original = report(settings={"sft": {"learning_rate": 1e-3}}, environment=environment())
    path = original.save(tmp_path / "run")
    assert Report.load(tmp_path / "run") == original
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_json_has_the_documented_names(tmp_path):
    """The names that users' own scripts read."""
    content = json.loads(report().save(tmp_path).read_text())
    assert set(STAGE_FIELDS) <= set(content["stages"][0])
    assert list(content["evaluation"]) == ["base", "sft", "dpo"]
    assert set(content["evaluation"]["dpo"]) == {"knowledge", "ability"}
    assert {"stages", "evaluation", "version", "created", "command", "base_model", "environment"} <= set(content)
    assert set(content["stages"][0]["moved"][0]) == {
        *("name", "layer", "category", "slot", "trainable", "relative_change", "relative_change_from_start")
    }


def test_figures_that_are_not_finite_become_null(tmp_path):
    """The file is strict JSON even where a trainer logged NaN."""
    odd = stage(last_loss=math.nan, history=[{"step": 1, "loss": math.inf}])
    report(odd).save(tmp_path)
    loaded = Report.load(tmp_path)
    assert loaded.stages[0].last_loss is None
    assert loaded.stages[0].history == [{"step": 1, "loss": None}]
    write_views(loaded, tmp_path)


def test_failed_write_leaves_the_old_report(tmp_path):
    """A report that cannot be written as JSON doesn't touch the one that is there."""
    report().save(tmp_path)
    with pytest.raises(TypeError):
        report(settings={"x": object()}).save(tmp_path)
    assert Report.load(tmp_path).stages
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_folder_that_cannot_be_written_is_named(tmp_path):
    """A file in the folder's place gives one line that names it."""
    (tmp_path / "file").write_text("")
    for write in (lambda: report().save(tmp_path / "file"), lambda: write_views(report(), tmp_path / "file")):
        with pytest.raises(HFTError, match=r"file can.* be written \(File exists"):
            write()


@pytest.mark.parametrize("field", STAGE_FIELDS)
def test_missing_stage_field_is_named(tmp_path, field):
    """A stage without one of its figures is refused by the figure's name."""
    path = report().save(tmp_path)
    content = json.loads(path.read_text())
    del content["stages"][1][field]
    path.write_text(json.dumps(content))
    with pytest.raises(HFTError, match=rf"stages\[1\]\.{field}: Field required"):
        Report.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(extra=1), "report.extra (1): Unexpected keyword argument"),
        (lambda c: c["stages"][0].update(speed=1), "report.stages[0].speed (1): Unexpected keyword argument"),
        (lambda c: c["stages"][0]["moved"][0].pop("slot"), "stages[0].moved[0].slot: Field required"),
        (lambda c: c["stages"][0].update(steps="many"), "stages[0].steps ('many'): Input should be a valid integer"),
        (lambda c: c["stages"][0].update(steps=True), "steps (True): Input should be a valid integer"),
        (lambda c: c.update(evaluation={"base": 3}), "evaluation.base (3): Input should be an object"),
        (lambda c: c.update(stages=[3]), "stages[0] (3): Input should be an object"),
        (lambda c: c.update(stages=3), "stages (3): Input should be a valid array"),
        (
            lambda c: c["stages"][0]["share"].update(model="half"),
            "share.model ('half'): Input should be a valid number",
        ),
        (lambda c: c.update(command=[1]), "command[0] (1): Input should be a valid string"),
        (lambda c: c.update(suites={"general": 3}), "suites.general (3): Input should be a valid array"),
        (lambda c: c.update(version=2), "has version 2"),
        (lambda c: c.pop("version"), "has version None"),
    ],
)
def test_foreign_content_is_refused(tmp_path, change, message):
    """What this version doesn't know or cannot use is refused in one line."""
    path = report().save(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(HFTError, match=re.escape(message)) as caught:
        Report.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1", "[]", "null", "\xff"])
def test_what_is_no_report_is_refused(tmp_path, text):
    """A torn, empty or foreign file and a missing one are user errors."""
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(HFTError, match=r"report\.json"):
        Report.load(tmp_path)
    with pytest.raises(HFTError, match=r"report\.json cannot be read"):
        Report.load(tmp_path / "nowhere")


def test_environment_names_versions_and_machine():
    """The libraries whose versions decide a result."""
    found = environment()
    assert {"hft_trl", "torch", "transformers", "trl", "accelerate", "datasets", "python", "platform"} <= set(found)


def numbers(content):
    """All numbers of a JSON value."""
    if isinstance(content, bool) or content is None:
        return []
    if isinstance(content, int | float):
        return [float(content)]
    if isinstance(content, str):
        return []
    values = content.values() if isinstance(content, dict) else content
    return [number for value in values for number in numbers(value)]


figures = st.floats(min_value=1e-3, max_value=99, allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    losses=st.tuples(figures, figures),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    counts=st.lists(st.integers(1, 10**12), min_size=6, max_size=6),
    speed=figures,
    scores=st.lists(st.floats(0, 100), min_size=4, max_size=4),
)
def test_every_number_in_the_text_is_in_the_json(losses, shares, counts, speed, scores):
    """
    Each number of the tables is one of the JSON's, rounded, in percent, or in binary units, or a difference of two
    scores.
    """
    record = stage(
        first_loss=losses[0],
        last_loss=losses[1],
        share=dict(zip(("attention", "layers", "model"), shares, strict=True)),
        trainable_params=counts[0],
        total_params=counts[1],
        steps=counts[2],
        tokens=counts[3],
        peak_memory_bytes=counts[4],
        optimizer_state_bytes=counts[5],
        tokens_per_second=speed,
        runtime_seconds=speed,
        history=[],
    )
    evaluation = {"base": {"a": scores[0], "b": scores[1]}, "sft": {"a": scores[2], "b": scores[3]}}
    whole = report(record, evaluation=evaluation)
    allowed = numbers(json.loads(json.dumps(whole, default=vars)))
    allowed += [scores[2] - scores[0], scores[3] - scores[1]]
    # Counts and means of units that learned (0.125 or 0.03125) or did not (0).
    allowed += [float(n) for n in range(len(record.moved))]
    scaled = [value * scale for value in allowed for scale in (1, 100, *(1024.0**-power for power in range(1, 5)))]
    rows = [line for line in report_markdown(whole, []).splitlines() if line.startswith("|")]
    shown = re.findall(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]\d+)?", "\n".join(rows))
    assert len(shown) > 20
    for text in shown:
        value, decimals = float(text.replace(",", "")), len(text.partition(".")[2])
        slack = 0.5001 * 10.0**-decimals
        assert any(abs(value - number) <= slack for number in scaled), text


def test_text_embeds_only_the_pictures_that_exist(tmp_path):
    """No dead link for a run without preferences or evaluation; every picture written is shown."""
    report(stage(), evaluation={}).save(tmp_path)
    written = {path.name for path in write_views(Report.load(tmp_path), tmp_path)}
    assert written == {"report.md", "report.html", "loss.png", "moved.png"}
    linked = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "report.md").read_text())
    assert set(linked) == written - {"report.md", "report.html"}


def test_views_of_an_earlier_run_do_not_stay(tmp_path):
    """A picture that the new report has no figures for is removed."""
    assert "margins.png" in {path.name for path in write_views(report(), tmp_path)}
    write_views(report(stage()), tmp_path)
    assert not (tmp_path / "margins.png").exists()


def test_text_keeps_command_settings_and_cells_apart():
    """What a user typed cannot break the Markdown around it."""
    text = report_markdown(
        report(command=["run", "a b"], settings={"x": "```"}, environment={"device": "a|b"}, base_model="m"), []
    )
    assert "run 'a b'" in text
    assert "````yaml\nx: '```'\n````" in text
    assert r"| device | a\|b |" in text


@pytest.mark.parametrize("name", ODD)
def test_views_of_odd_reports(tmp_path, name, capsys):
    """Whatever is missing or large, the views come from the loaded JSON alone, and every picture is a whole PNG."""
    ODD[name].save(tmp_path)
    loaded = Report.load(tmp_path)
    for path in write_views(loaded, tmp_path):
        content = path.read_bytes()
        assert content
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
            assert b"IEND" in content[-12:]
            width, height = (int.from_bytes(content[place : place + 4], "big") for place in (16, 20))
            assert 600 <= width <= 3000
            assert 300 <= height <= 6000
    print_report(loaded)
    output = capsys.readouterr().out
    assert all(word in output for record in loaded.stages for word in record.name.split())


def test_pictures_leave_pyplot_alone():
    """Importing the report loads neither matplotlib nor TRL; drawing never touches pyplot's global state."""
    code = (
        "import sys, tempfile; from pathlib import Path; import hft_trl.report as r, hft_trl.report.plots as p\n"
        "heavy = {'matplotlib', 'trl'} & set(sys.modules); assert not heavy, heavy\n"
        "s = r.StageRecord('s', 'hft', None, {}, 1, 2, 1, 1, 1., 1., 1, 1, 1., 1., True,\n"
        "    history=[{'step': 1, 'loss': 1.}], moved=[r.UnitChange('a', 0, 'norm', 'n', True, 1.)])\n"
        "assert len(r.write_views(r.Report([s], {'base': {'a': 1.}}), tempfile.mkdtemp())) == 5\n"
        "assert not {'matplotlib.pyplot', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loss_and_margin_have_a_panel_for_each_stage_that_logged_them():
    """Panels are the stages with such figures, in their order."""
    assert [axes.get_title() for axes in loss_figure(report()).axes] == ["sft (HFT)", "dpo (HFT)"]
    assert [axes.get_title() for axes in margin_figure(report()).axes] == ["dpo (HFT)"]
    line = next(line for line in margin_figure(report()).axes[0].lines if "margin" in line.get_label())
    assert len(line.get_xdata()) == 60


def test_standard_errors_stand_beside_the_scores_that_have_them():
    whole = report(stage(), evaluation={"base": {"a": 50.0, "b": 10.0}, "sft": {"a": 52.5, "b": 10.0}})
    whole.standard_errors = {"base": {"a": 1.25, "b": None}, "sft": {"a": 2.0}}
    grid = evaluation_grids(whole)[0]
    assert grid.rows == [["base", "50.0±1.2", "10.0"], ["sft", "52.5±2.0 (+2.5)", "10.0 (+0.0)"]]
    assert "standard error" in grid.title
    bars = [drawn for drawn in evaluation_figure(whole).axes[0].containers if isinstance(drawn, BarContainer)]
    assert all(container.errorbar is not None for container in bars)


def test_low_scores_keep_their_errors_inside_of_the_picture():
    whole = report(stage(), evaluation={"base": {"a": 1.0}, "sft": {"a": 3.0}})
    whole.standard_errors = {"base": {"a": 1.0}, "sft": {"a": 2.0}}
    assert evaluation_figure(whole).axes[0].get_ylim()[1] > 5.0


def test_each_suite_has_a_table_of_its_own():
    scores = {"a": 1.0, "b": 2.0, "one average": 1.5, "c": 3.0, "two average": 3.0}
    suites = {"one": ["a", "b", "one average"], "two": ["c", "two average"]}
    whole = report(stage(), evaluation={"base": scores, "sft": scores}, suites=suites)
    assert [grid.columns[1:] for grid in evaluation_grids(whole)] == list(suites.values())
    text = report_markdown(whole, [])
    assert "| model | a | b | one average |" in text
    assert "| model | c | two average |" in text
    assert [tick.get_text() for tick in evaluation_figure(whole).axes[0].get_xticklabels()] == list(scores)


def test_evaluation_bars_are_the_scores():
    """One bar for a model and measure, as high as the score in the JSON."""
    axes = evaluation_figure(report()).axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[99.5, 0.0], [88.25, 56.0], [89.25, 57.0]]


def test_frozen_cells_are_hatched_and_unmoved_ones_white():
    """In the heat map a cell is hatched exactly if it was frozen, and white exactly if it is the base's."""
    first = stage(moved=moved(3))
    earlier = {unit.name: unit.relative_change for unit in first.moved}
    second = stage("dpo", moved=moved(3, change=0.25, earlier={}) + [])
    for unit in second.moved:
        if not unit.trainable:
            unit.relative_change = 0.5 if earlier[unit.name] == 0 else 0.0
    parts = movement_figure(report(first, second)).subfigs
    for record, part in zip((first, second), parts, strict=True):
        plain, hatched = part.axes[0].collections
        inner = [unit for unit in record.moved if unit.layer is not None]
        assert hatched.get_hatch()
        assert not plain.get_hatch()
        assert len(hatched.get_facecolor()) == sum(not unit.trainable for unit in inner)
        white = sum(tuple(colour) == (1, 1, 1, 1) for group in (plain, hatched) for colour in group.get_facecolor())
        assert white == sum(unit.relative_change == 0 for unit in inner)


def test_movement_means_tell_learned_from_frozen():
    """The mean of the learned units isn't thinned by the frozen ones, and unknown changes count in neither."""
    units = [
        UnitChange("a", 0, "norm", "n", True, 0.5),
        UnitChange("b", 1, "norm", "n", True, 0.25),
        UnitChange("c", 2, "norm", "n", False, 0.0),
        UnitChange("d", 3, "norm", "n", False, None),
    ]
    (grid,) = movement_grids(report(stage(moved=units)))
    assert grid.rows == [["norm", "2", "37.500 %", "1", "0"]]


def test_a_later_stage_shows_its_own_change_beside_that_from_the_base():
    """After DPO the frozen half is as far from the base as SFT left it, and 0 from where the stage began."""
    first = stage()
    flipped = [replace(unit, trainable=not unit.trainable) for unit in first.moved if unit.layer is not None]
    second = [replace(unit, relative_change_from_start=0.0625 * unit.trainable) for unit in flipped]
    one, two = movement_grids(report(first, stage("dpo", moved=second)))
    assert one.columns == [
        "category",
        "units that learned",
        "change from the base",
        "frozen units",
        "change from the base",
    ]
    assert two.columns[2:4] == two.columns[5:] == ["change from the base", "change in dpo"]
    attention = next(row for row in two.rows if row[0] == "attention")
    assert attention == ["attention", "2", "0", "6.250 %", "2", "12.500 %", "0"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0"), (1e-9, "< 0.001 %"), (1.2e-5, "0.001 %"), (0.125, "12.500 %")]
)
def test_a_change_has_a_unit_and_even_decimals_and_zero_only_if_exact(value, text):
    assert change(value) == text


def test_scores_of_the_embedded_world_are_explained_wherever_they_are_shown(capsys):
    """In the Markdown, on the page and on the terminal; other measures need no words of ours."""
    whole = Report([], evaluation={"base": dict.fromkeys(("knowledge", "ability", "concise"), 1.0)})
    print_report(whole)
    for view in (report_markdown(whole, []), report_page(whole), capsys.readouterr().out):
        text = " ".join(view.split())
        assert all(f"{name}: {meaning}" in text for name, meaning in demo.MEANINGS.items())
    assert evaluation_grids(report(evaluation={"base": {"mmlu": 1.0}}))[0].note == ""


def test_the_stages_table_has_what_a_run_is_compared_by():
    rows = {name: cells for name, *cells in stage_grid(report()).rows}
    assert rows["rows in a batch"] == ["32", "32"]
    assert rows["epochs"] == ["3.00", "3.00"]
    assert rows["learning rate"] == ["0.001", "0.001"]
    assert rows["evaluation loss"] == ["2.5000", "2.5000"]
    assert "evaluation loss" not in dict.fromkeys(row[0] for row in stage_grid(report(stage(history=[]))).rows)


def test_a_model_chosen_by_evaluations_has_its_own_evaluation_s_loss():
    rows = [{"step": step, "eval_loss": value} for step, value in ((1, 3.0), (2, 2.0), (3, 2.5))]
    found = [dict(stage_grid(report(stage(history=rows, best_step=best))).rows) for best in (2, None)]
    assert [grid["evaluation loss"] for grid in found] == ["2.0000", "2.5000"]
    assert [grid.get("step of the saved model") for grid in found] == ["2", None]


def test_a_single_log_row_has_one_loss():
    one = stage(history=[{"step": 1, "loss": 2.0}], first_loss=2.0, last_loss=2.0)
    found = [dict(stage_grid(report(each)).rows)["loss, first to last"] for each in (one, stage())]
    assert found == ["2.0000", "4.0000 to 0.0667"]


def test_samples_stand_side_by_side_in_both_views():
    whole = Report([], samples=[{"prompt": "Q | 1?", "base": "one\ntwo", "sft": "", "dpo": "three"}])
    assert "| prompt | base | sft | dpo |" in report_markdown(whole, [])
    assert r"| Q \| 1? | one two | (empty) | three" in report_markdown(whole, [])
    assert "Sample answers" in report_page(whole)
    assert "Sample answers" not in report_markdown(report(), [])


def test_settings_are_folded_and_paths_are_the_run_s(tmp_path):
    """A stage's start in the run's folder is named by its place there, and the embedded files by their word."""
    first, second = stage(moved=[]), stage("dpo", start_model=str(tmp_path / "sft"), moved=[])
    report(first, second, settings={"sft": {"dataset": str(demo.SFT_DATA)}}).save(tmp_path)
    write_views(Report.load(tmp_path), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "<details>\n<summary>Settings</summary>\n\n```yaml\nsft:\n  dataset: demo\n```\n\n</details>" in text
    assert "| dpo | sft | data.jsonl |" in text
    assert str(tmp_path) not in text + (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("width", [50, 80, 120])
def test_headings_of_a_terminal_table_never_break_inside_words(width, monkeypatch, capsys):
    """Where a table is too wide for its headings it is turned, so that they stand in a column."""
    names = ["model", "knowledge", "ability instructions", "winogrande", "truthfulness", "hellaswag", "arc challenge"]
    grid = Grid("t", names, [[model, *["88.2±1.2 (-10.0)"] * 6] for model in ("base", "sft")])
    monkeypatch.setenv("COLUMNS", str(width))
    Console().print(rich_table(grid))
    assert {word for name in names for word in name.split()} <= set(capsys.readouterr().out.split())


def test_folded_cell_is_the_mean_of_its_units():
    """Experts share a column; its cell is frozen only if all of them are."""
    units = [
        UnitChange(
            f"{layer}.{n}", layer, "feed_forward", f"mlp.experts.{n}.up_proj", layer == 0 and n == 0, float(n == 0)
        )
        for layer in range(2)
        for n in range(20)
    ]
    (column,) = layer_map(units).columns
    assert column.pattern == "mlp.experts.*.up_proj"
    (part,) = movement_figure(report(stage(moved=units))).subfigs
    plain, hatched = part.axes[0].collections
    assert [len(cells.get_paths()) for cells in (plain, hatched)] == [1, 1]
    assert part.axes[1].get_ylim() == pytest.approx((0, 0.05))  # the scale ends at the largest cell
    assert (plain.get_facecolor() == hatched.get_facecolor()).all()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["attention", "feed_forward", "norm"]),
            st.lists(st.sampled_from(["mlp", "q_proj", "q", "experts", "0", "7", "12", "input_layernorm"]), min_size=1, max_size=4)
            .map(".".join),
        ),
        max_size=30,
    )
)  # fmt: skip
def test_labels_are_unique_in_their_category(slots):
    """Every slot is in a column, and two columns of a category never carry the same label."""
    grid = layer_map(UnitChange("", 0, category, slot, True, 1.0) for category, slot in slots)
    found = [(unit.category, unit.slot) for units in grid.cells.values() for unit in units]
    assert sorted(found) == sorted(slots)
    assert {column for _, column in grid.cells} == set(grid.columns)
    assert len({(column.category, column.label) for column in grid.columns}) == len(grid.columns)


GOLDEN = """\
layer  attention  feed_forward  norm
       q k v o    gate up down  input post_attn
    0  ■ □ □ □    □    ■  □     □     ■
    1  ■ □ □ □    □    ■  □     □     ■
    2  ■ □ □ □    □    ■  □     □     ■
    3  ■ □ □ ■    □    ■  □     □     ■

■ model.embed_tokens   □ lm_head   ■ model.norm

■ learns   □ frozen"""


def test_picture_of_a_llama():
    """A row a layer, slots in the model's order under their categories, what lies outside, and a legend."""
    units = find_units(tiny_llama(300))
    learns = re.compile(r"q_proj|up_proj|post_attention|embed|model\.norm|3\.self_attn\.o_proj")
    assert layer_picture(units, lambda unit: bool(learns.search(unit.names[0]))) == GOLDEN
    assert layer_picture(units, lambda _: True, marks=ASCII).isascii()


def test_picture_counts_experts_and_marks_absent_slots():
    """Experts are counted in one column, and a slot that a layer doesn't have is told from a frozen one."""
    units = [Unit(("layers.0.up.weight",), 8, "feed_forward", 0, "mlp.up_proj")]
    units += [Unit((f"layers.1.{n}.weight",), 8, "feed_forward", 1, f"mlp.experts.{n}.up_proj") for n in range(16)]
    learning = {"layers.0.up.weight", *(f"layers.1.{n}.weight" for n in range(5))}
    lines = layer_picture(units, lambda unit: unit.names[0] in learning).splitlines()
    assert lines[1].split() == ["up", "experts.up"]
    assert lines[2].split() == ["0", "■", "·"]
    assert lines[3].split() == ["1", "·", "5/16"]
    assert "no such unit" in lines[-1]
    assert "one of eight" in lines[-1]


@settings(max_examples=30, deadline=None)
@given(slots=st.integers(1, 26), layers=st.integers(1, 130))
def test_picture_fits_80_columns(slots, layers):
    """Long names give way to letters, and a key says what they stand for; a stack of any depth stays a row a layer."""
    units = [
        Unit((f"{layer}.{n}",), 1, "mixer", layer, f"mixer.quite_a_long_name_{chr(97 + n)}")
        for layer in range(layers)
        for n in range(slots)
    ]
    lines = layer_picture(units, lambda _: False).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.strip().split(" ")[0].isdigit() for line in lines) == layers
    assert all(f"quite_a_long_name_{chr(97 + n)}" in "\n".join(lines) for n in range(slots))


def test_shares_by_category_agree_with_the_selection():
    """The table's shares are the selection's, and its sums cover every parameter of the model once."""
    from hft_trl import HFTConfig

    model = tiny_llama(300)
    selection = select(model, HFTConfig(ratio=0.3))
    rows = {row.category: row for row in category_shares(find_units(model), selection.trainable)}
    assert {name: rows[name].share for name in selection.share} == pytest.approx(selection.share)
    assert list(rows) == ["attention", "feed_forward", "norm", "layers", "embedding", "lm_head", "final_norm", "model"]
    assert rows["model"].parameters == model.num_parameters()
    assert rows["layers"].trained == sum(rows[name].trained for name in ("attention", "feed_forward", "norm"))
    selection = select(model, HFTConfig(ratio=0.3, strategy="element"))
    rows = {row.category: row for row in category_shares(find_units(model), selection.trainable, selection.masked)}
    assert {name: rows[name].share for name in selection.share} == pytest.approx(selection.share)
    assert rows["layers"].share == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0 bytes"), (1023, "1,023 bytes"), (1024, "1.00 KiB"), (4_225_024, "4.03 MiB"), (5 * 2**50, "5,120.00 TiB")],
)  # fmt: skip
def test_sizes(value, text):
    """Bytes in binary units."""
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.04, "0.0 s"), (99.94, "99.9 s"), (100, "1 min 40 s"), (3780, "1 h 03 min")]
)
def test_durations(value, text):
    """Seconds as one reads them."""
    assert duration(value) == text


def test_stage_fields_match_the_dataclass():
    """The required fields of a stage are the documented ones."""
    assert [field.name for field in fields(StageRecord)][: len(STAGE_FIELDS)] == STAGE_FIELDS


def test_the_embedded_model_and_data_are_named_by_their_word():
    """Not by where the package is installed."""
    run = report(stage(start_model=str(demo.MODEL), dataset=str(demo.SFT_DATA)), base_model=str(demo.MODEL))
    for text in (report_markdown(run, []), report_page(run)):
        assert str(demo.ASSETS) not in text
        assert "demo" in text

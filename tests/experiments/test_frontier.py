"""The frontier: each method is trained at its rates, the front holds what nothing dominates, comparisons are fair."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hft_trl import HFTConfig, HFTError, demo, select
from hft_trl.experiments.frontier import (
    Difference,
    Frontier,
    Mean,
    compare_at_equal_loss,
    front,
    means,
    read_frontier,
    series,
)
from hft_trl.experiments.frontier_report import frontier_figure, grids
from hft_trl.experiments.frontier_trial import (
    _load_data,
    _tasks,
    frontier_points,
    make_trainer,
    parse_frontier,
    run_trial,
    versions,
)
from hft_trl.experiments.grid import BASE, METHODS, FrontierArguments, Trial, trials
from hft_trl.recipe.folder import LOCK_FILE

ROOT = Path(__file__).parents[2]


def point(method, loss, kept, rate=1e-4, seed=1, post_hoc=None, ratio=None):
    return {
        "method": method,
        "learning_rate": rate,
        "ratio": ratio,
        "seed": seed,
        "post_hoc": post_hoc,
        "learned": {"loss": loss},
        "kept": {"text_loss": kept, "facts": 100 - kept},
        "seconds": 1.0,
        "peak_memory_bytes": 1,
    }


def test_a_grid_has_each_method_at_its_own_rates_and_each_seed_in_turn():
    grid = FrontierArguments(
        methods=["fft", "hft:layer", "lora"], learning_rates=["1e-5", "lora=1e-3"], ratios=[0.3, 0.5], seeds=2
    )
    made = trials(grid)
    assert [(t.method, t.learning_rate, t.ratio, t.seed) for t in made[: len(made) // 2]] == [
        ("fft", "1e-5", None, 1),
        ("hft:layer", "1e-5", 0.3, 1),
        ("hft:layer", "1e-5", 0.5, 1),
        ("lora", "1e-3", None, 1),
    ]
    assert [t.seed for t in made] == sorted(t.seed for t in made)
    assert len({t.name for t in made}) == len(made)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_trained_with_the_settings_that_its_name_says(method):
    (trial,) = trials(FrontierArguments(methods=[method], learning_rates=["3e-5"], ratios=[0.25]))
    # Whatever a file sets for the stage, as the words before do
    recipe, _, _ = parse_frontier(["--sft.method=fft", "--sft.hft.ratio=0.9", "--sft.hft.seed=7", *trial.flags()])
    stage = recipe.stages["sft"]
    assert (stage.args.learning_rate, stage.args.seed, stage.hft.seed) == (3e-5, 1, 1)
    kind, _, half = method.partition(":")
    assert stage.hft.method == ("hft" if kind == "hft" else "fft")
    if kind == "hft":
        assert stage.hft.ratio == 0.25
        shown = {stage.hft.strategy, stage.hft.importance if stage.hft.strategy == "importance" else None}
        frozen = half == "frozen_embeddings"
        assert (stage.hft.train_embeddings, stage.hft.train_lm_head) == (not frozen, not frozen)
        assert ("category" if frozen or not half else half.split(":")[0]) in shown
        assert (stage.hft.importance_order == "least") is (half == "wanda" or half.endswith(":least"))


@pytest.mark.parametrize(
    "flag",
    [
        "overwrite",
        "evaluate=general",
        "method=fft",
        "hft.ratio=0.3",
        "hft.seed=7",
        "sft.seed=7",
        "sft.learning_rate=1",
        "retention.every=10",
        "sft.push_to_hub=true",
    ],
)
def test_a_setting_that_a_frontier_has_no_use_for_is_rejected(flag, tmp_path):
    recipe, grid, flags = parse_frontier([f"--{flag}", "--output_dir", str(tmp_path / "run")])
    with pytest.raises(
        HFTError, match=f"{flag.partition('=')[0]} is .*, which a frontier does not use: (set|remove) "
    ):
        frontier_points(recipe, grid, flags)
    assert not list(tmp_path.iterdir())


def test_a_frontier_in_several_processes_is_rejected(tmp_path, monkeypatch):
    """They would wait for each other's lock of the folder."""
    recipe, grid, flags = parse_frontier(["--output_dir", str(tmp_path / "run")])
    monkeypatch.setitem(PartialState()._shared_state, "num_processes", 2)
    with pytest.raises(HFTError, match=r"^num_processes is 2, but a frontier starts a process per GPU itself: "):
        frontier_points(recipe, grid, flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ["hft:magic"]}, "methods has .*hft:magic.*the valid ones are fft, hft"),
        ({"methods": ["hft:category"]}, "methods has .*hft:category"),
        ({"methods": []}, "methods has"),
        ({"learning_rates": []}, "learning_rates is empty"),
        ({"learning_rates": ["fast"]}, "learning_rates has 'fast'"),
        ({"learning_rates": ["0"]}, "learning_rates has '0'"),
        ({"learning_rates": ["lora=1e-3"]}, "learning_rates has none for fft"),
        ({"learning_rates": ["1e-5", "loar=1e-3"]}, "learning_rates has a rate for 'loar'"),
        ({"ratios": [1.5]}, "ratios is"),
        ({"average": [0.0]}, "average is"),
        ({"seeds": 0}, "seeds is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"lora_rank": 0}, "lora_rank is 0"),
    ],
)
def test_a_wrong_grid_is_rejected_by_name(wrong, message):
    with pytest.raises(HFTError, match=message):
        FrontierArguments(**{"learning_rates": ["1e-5"], **wrong})


def test_numbers_of_a_file_are_what_they_are_as_flags(tmp_path):
    """YAML reads 1e-5 as text and 1.0e-5 as a number."""
    config = tmp_path / "config.yaml"
    grid = "{learning_rates: [1.0e-5, 3e-5], ratios: ['0.3', 1]}"
    config.write_text(f"model: demo\noutput_dir: o\nsft: {{dataset: demo}}\nfrontier: {grid}\n")
    grid = parse_frontier(["--config", str(config)])[1]
    assert (grid.learning_rates, grid.ratios) == (["1e-05", "3e-5"], [0.3, 1.0])


def test_what_is_named_twice_is_trained_once():
    """Two equal trials would run in one folder at a time, and count as two seeds."""
    twice = {"methods": ["hft", "fft", "hft"], "ratios": [0.3, 0.3], "average": [0.5, 0.5]}
    grid = FrontierArguments(learning_rates=["1e-5", "1.0e-5", "fft=2e-5"], **twice)
    names = [trial.name for trial in trials(grid)]
    assert (names, grid.average) == (["hft-0.3-1e-5-1", "fft-2e-5-1"], [0.5])


def test_keys_of_the_grid_are_flags_with_and_without_their_section():
    words = ["--methods", "hft", "lora", "--seeds=3", "--frontier.learning_rates", "1e-4", "--sft.max_steps", "2"]
    recipe, grid, _ = parse_frontier(words)
    assert (grid.methods, grid.seeds, grid.learning_rates) == (["hft", "lora"], 3, ["1e-4"])
    assert recipe.stages["sft"].args.max_steps == 2
    with pytest.raises(HFTError, match=r"^unknown key lerning_rates: did you mean frontier.learning_rates[?]$"):
        parse_frontier(["--lerning_rates", "1e-4"])


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12), st.booleans())
def test_the_front_holds_exactly_what_no_other_dominates(places, higher):
    models = [Mean(str(n), "", "", loss, kept, 0, 0, 1) for n, (loss, kept) in enumerate(places)]
    found = front(models, "facts" if higher else "text_loss")

    def dominates(a, b):
        kept = (a.kept >= b.kept, a.kept > b.kept) if higher else (a.kept <= b.kept, a.kept < b.kept)
        return a.learned <= b.learned and kept[0] and (a.learned < b.learned or kept[1])

    assert found
    for model in models:
        assert (model.name in found) is not any(dominates(other, model) for other in models)


@settings(deadline=None)  # scipy is imported in the first call
@given(st.floats(-1, 1), st.floats(0.1, 2), st.integers(2, 6))
def test_a_shift_between_two_curves_is_found_at_equal_loss_whatever_their_rates(shift, slope, seeds):
    """Both lie on lines; one has other losses, since its rates are others."""
    points = []
    for seed in range(1, seeds + 1):
        for n, loss in enumerate((1.0, 0.8, 0.6)):
            points.append(point("fft", loss, 5 - slope * loss, rate=n + 1, seed=seed))
            points.append(point("hft", loss + 0.1, 5 - slope * (loss + 0.1) + shift, rate=n + 1, seed=seed, ratio=0.5))
    found = compare_at_equal_loss(points, "hft", "fft", "text_loss")
    assert found.seeds == seeds
    assert found.mean == pytest.approx(shift, abs=1e-9)
    upside = compare_at_equal_loss(points, "hft", "fft", "facts")
    assert upside.mean == pytest.approx(-shift, abs=1e-9)


def test_methods_without_a_common_loss_are_not_compared():
    points = [point("fft", loss, 3, rate=loss, seed=s) for loss in (0.5, 0.6) for s in (1, 2)]
    points += [point("lora", loss, 2, rate=loss, seed=s) for loss in (0.8, 0.9) for s in (1, 2)]
    assert compare_at_equal_loss(points, "lora", "fft", "text_loss") is None


def test_results_without_fft_are_read(tmp_path):
    """A grid need not have it, and the results are written after each model."""
    (tmp_path / "hft.json").write_text(json.dumps({"points": [point("hft", 1.0, 3.0, ratio=0.5)]}))
    found = read_frontier([tmp_path / "hft.json", tmp_path / "fft.json"], "text_loss")
    assert (found.front, found.differences) == (["hft 0.0001"], {})


def test_a_seed_in_which_a_method_is_not_finished_is_left_out():
    """The results are written after each model."""
    points = [point("fft", loss, 4 - loss, rate=loss, seed=s) for loss in (0.5, 0.7) for s in (1, 2, 3)]
    points += [point("hft", loss, 5 - loss, rate=loss, seed=s, ratio=0.5) for loss in (0.5, 0.7) for s in (1, 2)]
    points.append(point("hft", 0.5, 9.0, rate=0.5, seed=3, ratio=0.5))  # one of two
    found = compare_at_equal_loss(points, "hft", "fft", "text_loss")
    assert (found.seeds, found.mean) == (2, pytest.approx(1))


def test_the_best_model_of_a_seed_is_compared_up_to_the_losses_of_those_it_dominates():
    """Otherwise a seed would count only where a method's rates trade one figure for the other."""
    points = [point("fft", loss, 3 - loss, rate=loss, seed=1) for loss in (0.5, 0.7)]
    points += [point("fft", 0.6, 2.4, rate=0.5, seed=2), point("fft", 0.8, 2.9, rate=0.7, seed=2)]
    points += [point("hft", 0.7, 3.4, rate=rate, seed=s, ratio=0.5) for rate in (0.5, 0.7) for s in (1, 2)]
    found = compare_at_equal_loss(points, "hft", "fft", "text_loss")
    assert found.seeds == 2
    assert found.mean == pytest.approx(((3.4 - 2.3) + (3.4 - 2.4)) / 2)


def test_means_are_over_the_seeds_of_the_same_method_rate_and_treatment():
    points = [point("fft", 1.0, 3.0), point("fft", 2.0, 5.0, seed=2), point("fft", 9.0, 9.0, post_hoc="average 0.5")]
    plain, averaged = means(points, "text_loss")
    assert (plain.name, plain.learned, plain.kept, plain.seeds) == ("fft 0.0001", 1.5, 4.0, 2)
    assert (averaged.name, averaged.series, averaged.seeds) == ("fft 0.0001, average 0.5", "fft, average", 1)
    assert series(point("hft", 1, 1, ratio=0.3)) == "hft 0.3"


def difference(mean, p):
    return Difference(3, mean, mean - 0.01, mean + 0.01, p, 3)


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        ({}, "No test was possible: it needs fft and another method, two seeds, .* widen it\\)[.]$"),
        ({"hft": difference(-0.2, 0.01), "lora": difference(-0.1, 0.01)}, "Take hft: at an equal task loss it keeps"),
        ({"hft": difference(0.2, 0.01)}, "Take fft: .*; hft keeps less"),
        ({"hft": difference(-0.2, 0.3)}, "Take fft: .*; hft cannot be told from it with 3 seeds"),
    ],
)
def test_the_recommendation_says_only_what_the_tests_show(differences, sentence):
    assert re.match(sentence, Frontier([], [], [], differences, "text_loss").recommendation)


def test_without_a_test_the_recommendation_names_what_the_front_is_of():
    points = [point(BASE, 2.0, 1.0, rate=None), point("fft", 0.5, 2.0), point("hft", 0.6, 3.0)]
    models = means(points, "text_loss")
    found = Frontier(points, models, front(models, "text_loss"), {}, "text_loss")
    assert found.recommendation.endswith("in the means over the seeds the front is of fft alone.")


def test_the_figure_has_the_base_as_a_line_so_that_the_others_are_told_apart():
    """A base far from the task squeezed all other models into a corner."""
    points = [
        point(BASE, 90.0, 1.0, rate=None),
        point("fft", 0.5, 2.0),
        point("fft", 0.6, 1.5, post_hoc="average 0.5"),
    ]
    models = means(points, "text_loss")
    (axes,) = frontier_figure(Frontier(points, models, front(models, "text_loss"), {}, "text_loss")).axes
    assert max(axes.get_xlim()) < 1
    assert set(axes.get_legend_handles_labels()[1]) == {"base", "fft", "fft, average", "on the front"}


QUICK = ["--methods", "fft", "hft", "lora", "--learning_rates", "1e-3", "--average", "1", "--seeds", "1"]
QUICK += ["--sft.max_steps", "2", "--sft.split", "train[200:264]", "--sft.eval_split", "train[:16]"]
QUICK += ["--retention.max_rows", "4", "--workers", "2"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A frontier of two steps on the embedded world, run as users do."""
    output = tmp_path_factory.mktemp("frontier")
    command = [sys.executable, "recipes/frontier.py", *QUICK, "--output_dir", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return output, command


@pytest.mark.parametrize(
    ("method", "mark", "matrices"),
    [("lora", "lora_A", 7), ("lora:ffn", "lora_A", 3), ("oft", "oft_R", 7), ("shira", "shira_weight", 7)],
)
def test_an_adapter_is_beside_every_matrix_that_its_name_says_and_can_be_trained(tmp_path, method, mark, matrices):
    (trial,) = trials(FrontierArguments(methods=[method], learning_rates=["1e-3"]))
    words = [*QUICK[QUICK.index("--sft.max_steps") : -2], "--output_dir", str(tmp_path)]
    recipe, grid, _ = parse_frontier([*words, *trial.flags()])
    _load_data(recipe.stages["sft"])
    trainer = make_trainer(recipe.stages["sft"], trial, grid)
    learning = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert sum(mark in name for name in learning) == 8 * matrices  # layers
    assert all(".mlp." in name for name in learning) is (method == "lora:ffn")
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """Flags of a model whose class is in its folder; attention and feed-forward of GPT-2 both have a `c_proj`."""
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = shutil.copytree(demo.MODEL, tmp_path / "own")
    size = {"n_layer": 2, "n_embd": 16, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"], **size)
    GPT2LMHeadModel(config).save_pretrained(folder)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    own = {"model_type": "own_gpt2", "architectures": ["OwnForCausalLM"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | own))
    (folder / "own.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config):\n    model_type = 'own_gpt2'\n"
        "class OwnForCausalLM(GPT2LMHeadModel):\n    config_class = OwnConfig\n"
    )
    text = demo.ASSETS.joinpath("frontier.yaml").read_text()
    (tmp_path / "own.yaml").write_text(f"{text}\nretention:\n  texts: {folder / 'own.py'}\n")
    words = ["--config", str(tmp_path / "own.yaml"), "--model", str(folder), "--model.trust_remote_code", "true"]
    return [*words, *QUICK[QUICK.index("--sft.max_steps") : -2], "--output_dir", str(tmp_path / "out")]


def test_a_model_with_code_of_its_own_is_trained_and_averaged(own_code):
    (trial,) = trials(FrontierArguments(methods=["lora:ffn"], learning_rates=["1e-3"]))
    recipe, grid, _ = parse_frontier([*own_code, *trial.flags()])
    _load_data(recipe.stages["sft"])
    model = make_trainer(recipe.stages["sft"], trial, grid).model
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learning) == 8  # two matrices of two layers, each with A and B
    assert all(".mlp.c_" in name for name in learning)
    model = AutoModelForCausalLM.from_pretrained(recipe.stages["sft"].model.model_name_or_path, trust_remote_code=True)
    found = list(versions(model, recipe.stages["sft"], Trial("fft", "1e-3"), grid))
    assert found == [None, "average 0.25", "average 0.5", "average 0.75", "half-reset"]


def test_tasks_of_a_model_with_code_of_its_own_are_rejected_first(own_code):
    recipe, grid, flags = parse_frontier([*own_code, "--tasks", "demo"])
    with pytest.raises(
        HFTError, match=r"^tasks is 'demo' and model.trust_remote_code is true, but evaluation runs no"
    ):
        frontier_points(recipe, grid, flags)


def test_averages_of_a_half_keep_the_frozen_bits(tmp_path):
    recipe, grid, _ = parse_frontier(["--average", "0.25", "0.7", "--output_dir", str(tmp_path)])
    stage = recipe.stages["sft"]
    model = AutoModelForCausalLM.from_pretrained(stage.model.model_name_or_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learns = set(select(model, HFTConfig(seed=1)).trainable)
    with torch.no_grad():
        for name in learns:
            model.get_parameter(name).add_(torch.randn_like(before[name]))
    found = []
    for name in versions(model, stage, Trial("hft", "1e-3", 0.5), grid):
        found.append(name)
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == learns
    assert found == [None, "average 0.25", "average 0.7"]


def test_averages_of_a_quantized_half_change_only_what_learns(tmp_path):
    words = ["--average", "0.5", "--hft.frozen_quantization", "nf4", "--output_dir", str(tmp_path)]
    trial = Trial("hft", "1e-3", 0.5)
    recipe, grid, _ = parse_frontier([*words, *trial.flags()])
    stage = recipe.stages["sft"]
    _load_data(stage)
    trainer = make_trainer(stage, trial, grid)
    model, before, moved = trainer.model, {}, []
    for name, parameter in model.named_parameters():
        before[name] = parameter.detach().clone()
        if parameter.requires_grad:
            parameter.data.add_(1)
    for name in versions(model, stage, trial, grid):
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        moved.append((name, changed))
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == [(None, learns), ("average 0.5", learns)]


def test_tasks_score_a_quantized_half_with_the_start_models_bits(tmp_path):
    """No state dict holds the quantized matrices, so without them the model would be scored with random ones."""
    trial = Trial("hft", "1e-3", 0.5)
    recipe, grid, _ = parse_frontier(
        ["--hft.frozen_quantization", "nf4", "--output_dir", str(tmp_path), *trial.flags()]
    )
    _load_data(recipe.stages["sft"])
    trainer = make_trainer(recipe.stages["sft"], trial, grid)
    assert _tasks(trainer, tmp_path / "evaluated", "demo")["knowledge"] == 100  # as of the base


def test_texts_alone_are_enough_to_measure(tmp_path):
    (tmp_path / "general.txt").write_text("Ada lives in Rome. " * 9)
    (tmp_path / "scores").mkdir()
    words = ["--retention.texts", str(tmp_path / "general.txt"), "--output_dir", str(tmp_path)]
    run_trial(Trial(BASE), tmp_path, [*QUICK[QUICK.index("--sft.max_steps") : -2], *words])
    (found,) = json.loads((tmp_path / "scores" / "base.json").read_text())["points"]
    assert set(found["kept"]) == {"text_loss"}


def test_a_model_that_diverged_in_its_last_step_is_named_and_not_on_the_front(tmp_path):
    """The loss of its steps is finite, that of the model is not."""
    words = [*QUICK[QUICK.index("--sft.max_steps") : -2], "--output_dir", str(tmp_path)]
    (tmp_path / "scores").mkdir()
    with pytest.raises(HFTError, match="fft-4e9-1 ended with a task loss of nan"):
        run_trial(Trial("fft", "4e9"), tmp_path, words)
    assert not list((tmp_path / "scores").iterdir())


def test_the_task_loss_is_one_figure_whatever_loss_was_trained(tmp_path):
    """TRL's own `eval_loss` is that of `loss_type`."""
    losses = set()
    for loss_type in ("nll", "dft"):
        output = tmp_path / loss_type
        (output / "scores").mkdir(parents=True)
        words = ["--sft.loss_type", loss_type, "--output_dir", str(output)]
        run_trial(Trial(BASE), output, [*QUICK[QUICK.index("--sft.max_steps") : -2], *words])
        (found,) = json.loads((output / "scores" / "base.json").read_text())["points"]
        losses.add(found["learned"]["loss"])
    assert len(losses) == 1


def test_a_frontier_has_its_points_its_front_and_its_figure(small):
    output, _ = small
    found = json.loads((output / "frontier.json").read_text())
    by_name = {(p["method"], p["post_hoc"]): p for p in found["points"]}
    assert set(by_name) == {
        ("base", None),
        ("fft", None),
        ("fft", "average 1"),
        ("fft", "half-reset"),
        ("hft", None),
        ("hft", "average 1"),
        ("lora", None),
    }
    for p in found["points"]:
        assert {"method", "learning_rate", "ratio", "seed", "post_hoc", "learned", "kept"} < set(p)
        assert p["learned"]["loss"] > 0
        assert (p["seconds"] is None) is (p["method"] == "base")
    assert by_name["base", None]["kept"]["base_kl"] == pytest.approx(0, abs=1e-6)
    assert by_name["hft", None]["kept"]["base_kl"] > 0
    # A weight of 1 is the tuned model itself; half of it set back lies elsewhere
    for method in ("fft", "hft"):
        assert by_name[method, "average 1"]["learned"] == pytest.approx(by_name[method, None]["learned"])
        assert by_name[method, "average 1"]["kept"] == pytest.approx(by_name[method, None]["kept"])
    assert by_name["fft", "half-reset"]["kept"]["base_kl"] < by_name["fft", None]["kept"]["base_kl"]
    names = {model.name for model in means(found["points"], "text_loss")}
    assert set(found["front"]) <= names
    assert found["front"]
    assert (output / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "![Learned against kept, by method](frontier.png)" in (output / "frontier.md").read_text()


def test_a_finished_frontier_is_not_trained_again_and_more_rates_can_be_added(small):
    output, command = small
    before = {path: path.stat().st_mtime_ns for path in (output / "scores").iterdir()}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in (output / "scores").iterdir()} == before
    assert not list((output / "models").glob("*"))
    # Digests, not places, say what the results are of: the folder can move to another machine
    assert str(demo.ASSETS) not in (output / "settings.json").read_text()


def test_other_settings_are_rejected_in_the_same_folder(small):
    _, command = small
    run = subprocess.run([*command, "--sft.max_steps", "3"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "sft.max_steps 2, now they are 3" in run.stderr


@pytest.mark.parametrize("flag", ["--hft.source_texts", "--retention.texts"])
def test_a_changed_text_is_rejected_in_the_same_folder(tmp_path, flag):
    """The half of `wanda`, and what is kept, depend on the file's content, not on its folder."""
    words = [*QUICK, "--output_dir", str(tmp_path / "out"), flag]
    for folder, text in (("a", "Ada lives in Rome."), ("b", "Ada lives in Rome."), ("c", "Ada lives in Oslo.")):
        source = tmp_path / folder / "source.txt"
        source.parent.mkdir()
        source.write_text(text)
        recipe, grid, flags = parse_frontier([*words, str(source)])
        with pytest.raises(HFTError, match="texts_content") if folder == "c" else nullcontext():
            frontier_points(recipe, grid, flags)
    recorded = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert recorded.get("hft.source_texts", "source.txt") == "source.txt"
    assert str(tmp_path / "b") not in str(recorded)


def test_rows_that_a_later_command_leaves_out_are_named(tmp_path):
    """Its points would lack a figure that the folder's have, and the command with all rows would be rejected."""
    texts, prompts = tmp_path / "texts.txt", tmp_path / "prompts.jsonl"
    texts.write_text("Ada lives in Rome. " * 9)
    prompts.write_text('{"prompt": "Where does Ada live?"}\n')
    words = [*QUICK, "--output_dir", str(tmp_path / "out"), "--retention.texts", str(texts)]
    for more in (["--retention.prompts", str(prompts)], [], ["--retention.prompts", str(prompts)]):
        with nullcontext() if more else pytest.raises(HFTError, match=r"prompts_content \w+, now they are none"):
            frontier_points(*parse_frontier([*words, *more]))


def test_source_texts_can_come_with_the_method_that_reads_them(tmp_path):
    words = [*QUICK, "--output_dir", str(tmp_path / "out")]
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("Ada lives in Rome.")
    second.write_text("Ada lives in Oslo.")
    wanda = ["--methods", "fft", "hft:wanda", "--hft.source_texts"]
    for more in ([], [*wanda, str(first)], [], [*wanda, str(second)]):
        with pytest.raises(HFTError, match="now they are second") if str(second) in more else nullcontext():
            frontier_points(*parse_frontier([*words, *more]))


def test_a_folder_in_use_by_another_frontier_is_rejected(tmp_path):
    recipe, grid, flags = parse_frontier([*QUICK, "--output_dir", str(tmp_path)])
    with (tmp_path / LOCK_FILE).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(HFTError, match="is in use by process"):
            frontier_points(recipe, grid, flags)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    frontier_points(recipe, grid, flags)


def test_a_trial_that_another_process_trains_is_rejected(tmp_path):
    folder = tmp_path / "models" / BASE
    folder.mkdir(parents=True)
    with (folder / LOCK_FILE).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(HFTError, match="is in use by process"):
            run_trial(Trial(BASE), tmp_path, [*QUICK, "--output_dir", str(tmp_path)])


def test_the_tables_show_every_model_once(small):
    output, _ = small
    points = json.loads((output / "frontier.json").read_text())["points"]
    found = Frontier(points, means(points, "text_loss"), [], {}, "text_loss")
    (table,) = grids(found)
    assert [row[0] for row in table.rows] == [model.name for model in found.models]
    assert table.columns == ["", "seeds", "task loss", "text loss", "base kl", "facts", "front"]


def test_scores_of_tasks_are_what_was_learned_and_have_a_table(tmp_path):
    (tmp_path / "scores").mkdir()
    words = [*QUICK[QUICK.index("--sft.max_steps") : -2], "--tasks", "demo", "--output_dir", str(tmp_path)]
    run_trial(Trial(BASE), tmp_path, words)
    found = read_frontier([tmp_path / "scores" / "base.json"], "text_loss")
    (point,) = found.points
    assert set(point["kept"]) == {"text_loss", "base_kl", "facts"}
    _, table = grids(found)
    (row,) = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert row["knowledge"] == f"{point['learned']['knowledge']:.3f}" == "100.000"


def test_a_frontier_without_an_evaluation_split_or_anything_to_keep_is_rejected_first(tmp_path):
    config, texts = tmp_path / "own.yaml", tmp_path / "texts.txt"
    texts.write_text("Ada lives in Rome.")
    text = demo.ASSETS.joinpath("frontier.yaml").read_text().replace("frontier:\n", "frontier:\n  kept: facts\n", 1)
    best = "  load_best_model_at_end: true\n  eval_strategy: steps\n  eval_steps: 2\n  save_strategy: steps\n"
    best += "  save_steps: 2\n"
    for wrong, message in (
        (text.replace("  eval_split: train[:200]\n", ""), "sft.eval_split is missing"),
        (re.sub(r"  (eval|save)_(strategy|steps): .*\n", "", text).replace("sft:\n", f"sft:\n{best}"), "load_best"),
        (text + "\nretention:\n  max_rows: 0\n", "retention is missing"),
        (f"{text}\nretention:\n  texts: {texts}\n", "kept is facts, .*add them, or give --kept text_loss"),
    ):
        config.write_text(wrong)
        recipe, grid, flags = parse_frontier(["--config", str(config), "--output_dir", str(tmp_path / "out")])
        with pytest.raises(HFTError, match=message):
            frontier_points(recipe, grid, flags)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hft.source_texts", "none.txt"], r"none\.txt.* cannot be read"),
        (["--hft.exclude", "nothing"], "exclude"),
    ],
)
def test_what_only_one_method_rejects_is_found_before_another_is_trained(tmp_path, flags, message):
    words = ["--methods", "fft", "hft:wanda", "--output_dir", str(tmp_path / "out"), *flags]
    recipe, grid, words = parse_frontier(words)
    with pytest.raises(HFTError, match=message):
        frontier_points(recipe, grid, words)
    assert not (tmp_path / "out").exists()


def test_the_embedded_grid_is_the_default():
    recipe, grid, _ = parse_frontier([])
    assert recipe.stages["sft"].model.model_name_or_path == str(demo.MODEL)
    assert {"fft", "hft"} <= set(grid.methods)

"""benchmarks/peers.py: each peer trains what it says, rates are chosen alike, and what is printed is whole."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import PATIENCE, QUIET, tiny_llama
from transformers import TrainerCallback
from trl import SFTConfig
from warm import ROOT

from hft_trl import HFTConfig, HFTError
from hft_trl.chat import tulu_template

sys.path.insert(0, str(ROOT / "benchmarks"))

import peer_report
import peer_trainers
import peer_world
import peers
from peer_trainers import PEERS
from peer_world import RATE_SEED, Trial, best_rate, wanted

needs_badam = pytest.mark.skipif(find_spec("badam") is None, reason="BAdam's own package is not installed: .[peers]")
WITH_BADAM = [pytest.param(peer, marks=needs_badam if peer.startswith("badam") else ()) for peer in PEERS]
SHAPE = ["--hidden", "64", "--intermediate", "64", "--layers", "2", "--heads", "1", "--vocab", "1024"]
SMALL = [*SHAPE, "--batch", "2", "--length", "16"]


class Moves(TrainerCallback):
    """Notes after every step which of the parameters moved in it."""

    def __init__(self, model):
        self.model, self.before, self.moved = model, {}, []

    def on_train_begin(self, *args, **kwargs):
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def on_step_end(self, *args, **kwargs):
        now = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.moved.append({name for name, p in now.items() if not torch.equal(p, self.before[name])})
        self.before = now


@pytest.fixture
def train(tokenizer, tulu, tmp_path):
    """Trains a peer for some steps, and tells which parameters moved in each, and which there are."""

    def run(peer, steps=4, **badam):
        model = tiny_llama(len(tokenizer))
        tokenizer.chat_template = tulu_template()
        arguments = {**QUIET, "max_steps": steps, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        given = {"model": model, "train_dataset": tulu, "processing_class": tokenizer}
        given["args"] = SFTConfig(str(tmp_path / peer), max_length=32, **arguments)
        trainer = peer_trainers.make_trainer(peer, HFTConfig(seed=1), badam, **given)
        moves = Moves(trainer.model)
        trainer.add_callback(moves)
        trainer.train()
        return trainer, moves.moved, set(moves.before)

    yield run
    tokenizer.chat_template = None


def test_full_fine_tuning_moves_all(train):
    _, moved, names = train("fft")
    assert set.union(*moved) == names


def test_hft_moves_its_half_and_nothing_else(train):
    trainer, moved, names = train("hft")
    assert set.union(*moved) == set(trainer.hft_selection.trainable)
    assert names - set(trainer.hft_selection.trainable) == set(trainer.hft_selection.frozen)


def test_last_half_moves_all_but_the_last_half_of_the_layers(train):
    _, moved, names = train("last_half")
    frozen = {name for name in names if name.startswith(("model.layers.2.", "model.layers.3."))}
    assert len(frozen) == 2 * 9
    assert set.union(*moved) == names - frozen


def test_lora_moves_adapters_of_every_layer_and_no_weight_of_the_model(train):
    _, moved, names = train("lora")
    adapters = {name for name in names if "lora_" in name}
    assert len(adapters) == 4 * 7 * 2
    assert set.union(*moved) == adapters


@needs_badam
def test_badam_moves_one_layer_at_a_time_and_neither_embedding_nor_head(train):
    trainer, moved, _ = train("badam", steps=8, switch_block_every=2, switch_mode="ascending")
    layers = [{name.split(".")[2] for name in names} for names in moved]
    # Its own count: the first block has a step less than the others
    assert layers == [{"0"}, {"1"}, {"1"}, {"2"}, {"2"}, {"3"}, {"3"}, {"0"}]
    assert all(len(names) == 9 for names in moved)
    assert all(name.startswith("model.layers.") for names in moved for name in names)
    state = peer_trainers.optimizer_tensors(trainer)
    block = sum(p.numel() for p in trainer.model.model.layers[0].parameters())
    # Two moments, and a float32 copy of the block
    assert sum(tensor.numel() for tensor in state if tensor.dim() > 0) == 3 * block


@needs_badam
def test_badam_all_has_embedding_and_head_as_blocks_too(train):
    _, moved, names = train("badam_all", steps=8, switch_block_every=1, switch_mode="ascending")
    outer = [step for step in moved if not any(name.startswith("model.layers.") for name in step)]
    assert {"lm_head.weight", "model.norm.weight"} in outer
    assert {"model.embed_tokens.weight"} in outer
    assert set.union(*moved) == names
    assert peer_trainers.number_of_blocks("badam_all", tiny_llama(300)) == 6


def test_badam_without_its_package_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(peer_trainers, "find_spec", lambda name: None)
    with pytest.raises(HFTError, match=r"badam needs its own package.*\[peers\]"):
        peer_trainers.check_packages(["fft", "badam_all"])
    peer_trainers.check_packages(["fft", "lora"])


def scores_of(curve, peer="fft", seed=RATE_SEED):
    return {Trial(peer, rate, seed): {"knowledge": value, "ability": value} for rate, value in curve.items()}


def climb(truth, peer="fft"):
    """Rates in the order in which they are tried, where the score at each is known."""
    scores, order = {}, []
    while trial := next((t for t in wanted([peer], scores, 3) if t.seed == RATE_SEED), None):
        order.append(trial.rate)
        scores |= scores_of({trial.rate: truth(trial.rate)}, peer)
    return order, scores


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("best", [2.5e-4, 1e-3, 8e-3])
def test_every_peers_rate_is_the_one_that_is_better_than_twice_and_half_of_it(peer, best):
    order, scores = climb(lambda rate: -abs(rate - best) / best, peer)
    assert best_rate(peer, scores) == best
    assert {best / 2, best, 2 * best} <= set(order)
    assert len(set(order)) == len(order)


def test_the_seed_of_the_rates_is_none_of_the_figures(capsys):
    _, scores = climb(lambda rate: -abs(rate - 1e-3))
    assert wanted(["fft"], scores, 3) == [Trial("fft", 1e-3, seed) for seed in (1, 2, 3)]
    with pytest.raises(SystemExit, match="2"):
        peers.parse(["--seeds", str(RATE_SEED)])
    assert "is kept apart" in capsys.readouterr().err


def test_other_seeds_do_not_choose_a_rate():
    _, scores = climb(lambda rate: -abs(rate - 1e-3))
    assert best_rate("fft", {**scores, **scores_of({4e-3: 100}, seed=1)}) == 1e-3


@pytest.mark.parametrize("flag", ["--sft.seed=1", "--sft.learning_rate", "--hft.ratio", "--method"])
def test_flags_in_which_the_peers_differ_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        peers.parse([flag, "1"])
    assert "drop it" in capsys.readouterr().err


def test_seconds_of_badam_are_those_of_whole_cycles_through_its_blocks():
    options, flags = peers.parse(["--layers", "6", "--switch_every", "3", "--sft.max_steps", "4"])
    assert options.rounds % (2 * 6 * 3) == 0  # also where each half of the rounds is a block
    assert options.peak_steps >= 6 * 3
    assert flags == ["--sft.max_steps", "4"]


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--workers", "--workers 0: it must be at least 1"),
        ("--switch_every", "--switch_every 0: it must be at least 1"),
    ],
)
def test_numbers_that_can_not_be_are_refused(flag, complaint, capsys):
    with pytest.raises(SystemExit, match="2"):
        peers.parse([flag, "0"])
    assert complaint in capsys.readouterr().err


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """
    Asks for the cost with some flags, where each measuring takes no time, and tells the peers of the file and how
    often.
    """
    times = []

    def measure(settings, options):
        times.append(settings)
        return [{"variant": setting.variant, "bytes": {}, "steps": [{"total": 1.0}]} for setting in settings]

    monkeypatch.setattr(peers.step, "measure", measure)
    monkeypatch.setattr(peers.step, "peak", lambda setting, options: 1)

    def ask(*flags):
        found = peers.measure_cost(peers.parse([*SMALL, *flags])[0], tmp_path)
        assert found == peers.read_cost(tmp_path)
        return [row["variant"] for row in found.get("records", [])], len(times)

    return ask


def test_a_measured_cost_is_kept_for_fewer_peers_and_goes_only_for_more(measured):
    assert measured("--peers", "badam_all") == ([], 0)  # it has no cost
    assert measured("--peers", "fft", "hft") == (["fft", "hft"], 1)
    assert measured("--peers", "hft") == measured("--peers", "badam_all") == (["fft", "hft"], 1)
    assert measured("--peers", "lora", "hft", "fft") == (["lora", "hft", "fft"], 2)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--peers", "hft", "lora"], "the peers fft hft, now hft lora"),
        (["--peers", "fft", "hft", "--batch", "3"], "batch 2, now 3"),
    ],
)
def test_a_measured_cost_that_would_be_lost_is_named(measured, flags, difference):
    measured("--peers", "fft", "hft")
    with pytest.raises(HFTError, match=f"cost.json was measured with {difference}: ask for the same") as error:
        measured(*flags)
    assert "\n" not in str(error.value)
    assert measured("--peers", "fft") == (["fft", "hft"], 1)


def made(peer, folder):
    """Scores of three rates and two seeds."""
    first = peer_world.FIRST_RATE.get(peer, peer_world.DEMO_RATE)
    for rate, value in ((first / 2, 50.0), (first, 60.0 + len(peer)), (2 * first, 40.0)):
        peer_world.write_scores(folder, Trial(peer, rate, RATE_SEED), {"knowledge": value, "ability": value})
    for seed in (1, 2):
        peer_world.write_scores(folder, Trial(peer, first, seed), {"knowledge": 70.0 + seed, "ability": 65.0 - seed})


def test_tables_and_figure_hold_every_peer_and_the_base(tmp_path):
    (tmp_path / "scores").mkdir()
    peer_world.write_scores(tmp_path, Trial("base", 0.0, 0), {"knowledge": 100.0, "ability": 0.0})
    for peer in PEERS:
        made(peer, tmp_path)
    scores = peer_world.read_scores(tmp_path)
    world, base = peer_report.by_peer(scores), scores[Trial("base", 0.0, 0)]
    table, differences = peer_report.grids(world, base, {})
    rows = {row[0]: row[1:5] for row in table.rows}
    assert list(rows) == ["base", *PEERS]
    assert rows["base"] == ["-", "1", "100.0", "0.0"]
    assert rows["lora"] == ["0.004", "2", "71.5 (0.7)", "63.5 (0.7)"]
    assert {row[0] for row in differences.rows} == set(PEERS) - {"hft"}
    labels = [text.get_text() for text in peer_report.figure(world, base).axes[0].get_legend().get_texts()]
    assert sorted(labels) == sorted(["base", *(f"{peer} at {found['best_rate']:g}" for peer, found in world.items())])


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the script prints where all models but one of seed 3 are made, and nothing is known of the cost."""
    folder = tmp_path_factory.mktemp("peers")
    (folder / "scores").mkdir()
    asked = [peer for peer in PEERS if find_spec("badam") or not peer.startswith("badam")]
    for peer in asked:
        made(peer, folder)
        if peer != "hft":
            trial = Trial(peer, peer_world.FIRST_RATE.get(peer, peer_world.DEMO_RATE), 3)
            peer_world.write_scores(folder, trial, {"knowledge": 70.0, "ability": 60.0})
    words = ["--json", "--seeds", "3", "--output_dir", str(folder), "--switch_every", "1", *SMALL, "--peers", *asked]
    command = [sys.executable, "benchmarks/peers.py", *words, "--sft.max_steps", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, asked, json.loads(result.stdout)  # stdout holds nothing else


def test_json_has_every_peer_and_figure(printed):
    folder, asked, found = printed
    assert found["environment"]["torch"]
    assert found["base"] == {**found["base"], "knowledge": 100.0, "ability": 0.0}
    assert list(found["world"]) == asked
    for peer in asked:
        assert set(found["world"][peer]["seeds"]) == {"1", "2", "3"}
        assert len(found["world"][peer]["rates"]) == 3
    one = found["world"]["hft"]["seeds"]["3"]
    assert one["knowledge"] > 90  # a single step, with a rate that is being warmed up
    costs = {row["variant"]: row for row in found["cost"]["records"]}
    assert set(costs) == set(asked) - {"badam_all"}
    for row in costs.values():
        assert len(row["steps"]) == 4
        assert row["mean_seconds"] > 0
        assert all(row["bytes"][name] > 0 for name in ("trained", "optimizer", "gradient", "peak"))
    assert costs["hft"]["bytes"]["optimizer"] < costs["fft"]["bytes"]["optimizer"]
    assert len({row["losses"][0] for peer, row in costs.items() if peer != "lora"}) == 1  # the same weights and tokens
    for name in ("results.md", "retention.png", "cost.json"):
        assert (folder / name).exists()


def test_what_is_there_is_neither_made_nor_measured_again(printed, monkeypatch, capsys):
    folder, asked, found = printed
    before = {path: path.stat().st_mtime_ns for path in [*(folder / "scores").iterdir(), folder / "cost.json"]}
    words = ["--seeds", "3", "--output_dir", str(folder), "--switch_every", "1", *SMALL, "--peers", *asked]
    options, flags = peers.parse([*words, "--sft.max_steps", "1", "--json"])
    monkeypatch.setattr(peers.step, "measure", None)
    peers.main(options, flags)
    assert json.loads(capsys.readouterr().out)["world"] == found["world"]
    assert {path: path.stat().st_mtime_ns for path in before} == before

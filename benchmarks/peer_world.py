"""SFT on the embedded world by every peer: a learning rate for each, then a model for each seed."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from peer_trainers import make_trainer, number_of_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, SFTConfig

from hft_trl import demo, exit_on_user_error
from hft_trl.demo.probes import evaluate
from hft_trl.experiments.runner import Point, result_file, run_points
from hft_trl.files import write_json
from hft_trl.recipe import parse_recipe

FIRST_RATE = {"lora": 4e-3, "badam": 4e-3, "badam_all": 2e-3}
"""First rate of the search for the best, for peers that do not begin at the demo's."""
DEMO_RATE = 1e-3
RATE_SEED = 10  # only chooses the rates: the figures are of seeds 1 and up
BASE = "base"


class Trial(NamedTuple):
    """One model: a peer, its learning rate and a seed."""

    peer: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.peer}-{self.rate:g}-{self.seed}"


Scores = Mapping[Trial, Mapping[str, float]]


def both(scores: Mapping[str, float]) -> float:
    """Mean of knowledge and ability, by which a learning rate is chosen."""
    return fmean((scores["knowledge"], scores["ability"]))


def tried(peer: str, scores: Scores) -> dict[float, float]:
    """[`both`] by learning rate, on the seed of the rates."""
    return {
        trial.rate: both(found) for trial, found in scores.items() if (trial.peer, trial.seed) == (peer, RATE_SEED)
    }


def best_rate(peer: str, scores: Scores) -> float | None:
    """The best rate once twice and half of it were tried too, otherwise `None`."""
    return None if next_rate(peer, scores) else max(sorted(tried(peer, scores).items()), key=lambda pair: pair[1])[0]


def next_rate(peer: str, scores: Scores) -> float | None:
    """The rate to try next in the search for the best, `None` when it is found."""
    known = tried(peer, scores)
    best = max(sorted(known), key=lambda rate: known[rate], default=FIRST_RATE.get(peer, DEMO_RATE))
    return next((rate for rate in (best, best / 2, 2 * best) if rate not in known), None)


def wanted(peers: Iterable[str], scores: Scores, seeds: int) -> list[Trial]:
    """Models that can be made now: each peer's next learning rate or, once its rate is chosen, its seeds."""
    trials = []
    for peer in peers:
        rate = next_rate(peer, scores)
        if rate is not None:
            trials.append(Trial(peer, rate, RATE_SEED))
        else:
            trials += [Trial(peer, best_rate(peer, scores), seed) for seed in range(1, seeds + 1)]
    missing = [trial for trial in trials if trial not in scores]
    return sorted(missing, key=lambda trial: (trial.seed != RATE_SEED, trial.seed))


def make(trial: Trial, output: Path, flags: Sequence[str]) -> None:
    """Make one model and write its scores on the embedded world."""
    if trial.peer == BASE:
        model = AutoModelForCausalLM.from_pretrained(demo.MODEL)
    else:
        with tempfile.TemporaryDirectory() as folder:  # nothing is saved there, but trainers want one
            model = train(trial, folder, flags)
    write_scores(output, trial, evaluate(model, AutoTokenizer.from_pretrained(demo.MODEL)))


def train(trial: Trial, folder: str, flags: Sequence[str]) -> PreTrainedModel:
    """SFT of the embedded model as in the demo, with the trial's learning rate and seed and the peer's trainer."""
    words = ["--output_dir", folder, "--sft.learning_rate", str(trial.rate), "--sft.seed", str(trial.seed)]
    words += ["--hft.seed", str(trial.seed), "--sft.save_strategy", "no", "--sft.disable_tqdm", "true", *flags]
    stage = parse_recipe(words, {"sft": SFTConfig, "dpo": DPOConfig}, demo.RECIPE).stages["sft"]
    stage.args.model_init_kwargs = None  # the model is given as it is
    stage.load_data()
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL)
    batch = stage.args.per_device_train_batch_size * stage.args.gradient_accumulation_steps
    # As in BAdam's README: each block is trained once per epoch
    badam = {
        "switch_block_every": max(1, round(len(stage.train_dataset) / (batch * number_of_blocks(trial.peer, model))))
    }
    trainer = make_trainer(
        trial.peer,
        dataclasses.replace(stage.hft, seed=trial.seed),
        {**badam, "switch_mode": "random"},
        model=model,
        args=stage.args,
        train_dataset=stage.train_dataset,
        processing_class=stage.load_tokenizer(),
    )
    trainer.train()
    return trainer.model.merge_and_unload() if trial.peer == "lora" else trainer.model


def write_scores(output: Path, trial: Trial, scores: Mapping[str, float]) -> None:
    """Write the scores of a model where [`read_scores`] finds them."""
    write_json(result_file(output, trial.name), {**trial._asdict(), "scores": dict(scores)})


def read_scores(output: Path) -> dict[Trial, dict[str, float]]:
    """The scores of every model that was made so far, and of the base."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "scores").glob("*.json"))]
    return {Trial(row["peer"], row["rate"], row["seed"]): row["scores"] for row in found}


def make_all(peers: Sequence[str], seeds: int, output: Path, workers: int, flags: Sequence[str]) -> Iterator[str]:
    """Make and score every model that has no scores yet, and yield its name."""

    def points() -> list[Point]:
        trials = [Trial(BASE, 0.0, 0), *wanted(peers, read_scores(output), seeds)]
        command = [sys.executable, __file__, str(output)]
        return [Point(trial.name, (*command, *map(str, trial), *flags)) for trial in trials]

    return (point.name for point in run_points(points, output, workers))


if __name__ == "__main__":
    with exit_on_user_error():
        output, peer, rate, seed, *flags = sys.argv[1:]
        make(Trial(peer, float(rate), int(seed)), Path(output), flags)

"""The paper's questions about the embedded world: the models to make and to compare."""

from itertools import product
from typing import Any, Literal, NamedTuple

BASE = "base"
RATIOS = tuple(tenth / 10 for tenth in range(1, 10))


class Run(NamedTuple):
    """Recipe for a model of a seed. `hft` overrides the demo's [`HFTConfig`]."""

    name: str
    start: str  # run that it starts from, "" only for the base
    how: Literal["base", "sft", "dpo", "half-reset", "blend"]
    hft: dict[str, Any]
    sweep: bool = False  # needs fewer seeds


class Question(NamedTuple):
    """
    Runs (by label, in table order) whose `scores` answer a question of the paper.

    The others are compared with the run of the label `against`.
    """

    name: str
    title: str
    runs: dict[str, str]
    against: str
    scores: tuple[str, ...] = ("knowledge", "ability")


def _sft(name: str, sweep: bool = True, **hft: Any) -> Run:
    return Run(name, BASE, "sft", hft, sweep)


RUNS = {
    run.name: run
    for run in (
        Run(BASE, "", "base", {}),
        _sft("sft-fft", sweep=False, method="fft"),
        _sft("sft-hft", sweep=False),
        *(Run(f"dpo-{b}-from-{a}", f"sft-{a}", "dpo", {"method": b}) for a, b in product(("fft", "hft"), repeat=2)),
        *(Run(f"reset-{how}", "sft-fft", "half-reset", {"strategy": how}) for how in ("category", "layer", "model")),
        Run("blend", "sft-fft", "blend", {}),
        *(_sft(f"sft-{strategy}", strategy=strategy) for strategy in ("layer", "model")),
        *(_sft(f"sft-ratio-{ratio}", ratio=ratio) for ratio in RATIOS if ratio != 0.5),
        *(_sft(f"sft-{kind}", frozen_quantization=kind) for kind in ("int8", "nf4")),
        _sft("sft-no-embeddings", train_embeddings=False),
        _sft("sft-no-head", train_lm_head=False),
        _sft("sft-neither", train_embeddings=False, train_lm_head=False),
        *(
            _sft(f"sft-{by.replace('_', '-')}-{order}", strategy="importance", importance=by, importance_order=order)
            for by, order in product(("weight_norm", "gradient_norm"), ("most", "least"))
        ),
        _sft("sft-element", strategy="element"),
        *(Run(f"dpo-{again}", "sft-hft", "dpo", {"reselect": again}, sweep=True) for again in ("same", "complement")),
    )
}  # fmt: skip
"""Every run by its name, each after the one it starts from."""

QUESTIONS = (
    Question(
        "sft",
        "SFT: does HFT forget less than FFT, and learn as much?",
        {BASE: BASE, "FFT": "sft-fft", "HFT": "sft-hft"},
        against="FFT",
    ),
    Question(
        "dpo",
        "DPO: FFT or HFT, from an FFT or HFT initialisation",
        {
            "FFT, then FFT": "dpo-fft-from-fft",
            "FFT, then HFT": "dpo-hft-from-fft",
            "HFT, then FFT": "dpo-fft-from-hft",
            "HFT, then HFT": "dpo-hft-from-hft",
        },
        against="FFT, then FFT",
        scores=("knowledge", "ability", "concise"),
    ),
    Question(
        "reset",
        "Half-Reset: does setting half of a fully tuned model back bring the base's knowledge back?",
        {
            "FFT": "sft-fft",
            "half reset, by category": "reset-category",
            "half reset, whole layers": "reset-layer",
            "half reset, any matrix": "reset-model",
            "average with the base": "blend",
            "HFT": "sft-hft",
        },
        against="FFT",
    ),
    Question(
        "strategy",
        "Strategy: half of each category, of the layers, or of all matrices?",
        {"category": "sft-hft", "layer": "sft-layer", "model": "sft-model"},
        against="category",
    ),
    Question(
        "importance",
        "Importance: a random half of each category, the most or least important one, or half of every matrix's "
        "elements?",
        {
            "random": "sft-hft",
            "largest weights": "sft-weight-norm-most",
            "smallest weights": "sft-weight-norm-least",
            "largest gradients": "sft-gradient-norm-most",
            "smallest gradients": "sft-gradient-norm-least",
            "elements": "sft-element",
        },
        against="random",
    ),
    Question(
        "ratio",
        "Ratio: how much should learn?",
        {**{f"{r:.1f}": "sft-hft" if r == 0.5 else f"sft-ratio-{r}" for r in RATIOS}, "1.0 (FFT)": "sft-fft"},
        against="0.5",
    ),
    Question(
        "embeddings",
        "Embedding and head: should they learn?",
        {
            "both learn": "sft-hft",
            "embedding frozen": "sft-no-embeddings",
            "head frozen": "sft-no-head",
            "both frozen": "sft-neither",
        },
        against="both learn",
    ),
    Question(
        "reselect",
        "The second stage: a fresh half, the same one, or the other one?",
        {"fresh": "dpo-hft-from-hft", "same": "dpo-same", "complement": "dpo-complement"},
        against="fresh",
        scores=("knowledge", "ability", "concise"),
    ),
    Question(
        "quantization",
        "The frozen half in 8 or 4 bits while training: what does it cost?",
        {"as it is": "sft-hft", "int8": "sft-int8", "nf4": "sft-nf4"},
        against="as it is",
    ),
)


def needed(questions: tuple[Question, ...]) -> list[Run]:
    """Return the runs of some questions and the runs they start from, each after its start."""
    names = {name for question in questions for name in question.runs.values()}
    names |= {RUNS[name].start for name in names}
    return [run for run in RUNS.values() if run.name in names]

"""Reports as runs leave them, small and odd ones: what the tests of every view are made from."""

from hft_trl.report import Report, StageRecord, UnitChange

SLOTS = {
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "mlp.up_proj": "feed_forward",
    "input_layernorm": "norm",
}


def moved(layers=2, slots=SLOTS, change=0.125, earlier=None):
    """Every other unit learned; what did not is where an earlier stage left it, and moved by 0 in its own."""
    units = []
    for layer in range(layers):
        for number, (slot, category) in enumerate(slots.items()):
            name, learns = f"model.layers.{layer}.{slot}.weight", (layer + number) % 2 == 0
            before = earlier.get(name, 0.0) if earlier else 0.0
            own = change / 2 if earlier else change
            units.append(UnitChange(name, layer, category, slot, learns, change if learns else before, own * learns))
    return [*units, UnitChange("lm_head.weight", None, "lm_head", "lm_head", True, 0.03125, 0.03125)]


def stage(name="sft", **values):
    history = [
        {"step": step, "loss": 4 / step, "learning_rate": 1e-3, "epoch": step / 20, "eval_loss": 2.5}
        for step in range(1, 61)
    ]
    if name == "dpo":
        history = [{**row, "rewards/margins": row["step"] / 60, "rewards/chosen": 0.1} for row in history]
    history.append({"step": 60, "train_runtime": 12.5, "train_loss": 0.5})
    figures = {
        "name": name,
        "method": "hft",
        "selection_digest": "ab" * 32,
        "share": {"attention": 0.5, "layers": 0.5, "model": 0.5643},
        "trainable_params": 528_128,
        "total_params": 935_872,
        "steps": 60,
        "tokens": 1_234_567,
        "tokens_per_second": 98_765.25,
        "runtime_seconds": 12.5,
        "peak_memory_bytes": 811_597_824,
        "optimizer_state_bytes": 4_225_024,
        "first_loss": 4.0,
        "last_loss": 0.0667,
        "frozen_unchanged": True,
        "start_model": "base",
        "dataset": "data.jsonl",
        "rows": 640,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "dropped_rows": 3,
        "history": history,
        "moved": moved(),
    }
    return StageRecord(**{**figures, **values})


def report(*stages, **values):
    stages = stages or (stage(), stage("dpo", moved=moved(change=0.0625)))
    scores = {"base": {"knowledge": 99.5, "ability": 0.0}}
    scores |= {s.name: {"knowledge": 88.25 + n, "ability": 56.0 + n} for n, s in enumerate(stages)}
    return Report(
        list(stages), **{"evaluation": scores, "base_model": "base", "command": ["run", "--x", "a b"], **values}
    )


WIDE = {f"mlp.experts.{n}.{slot}": "feed_forward" for n in range(64) for slot in ("gate_proj", "up_proj", "down_proj")}
MIXED = [
    UnitChange("a", 0, "mixer", "mamba.in_proj", True, 0.5),
    UnitChange("b", 1, "attention", "attn.q_proj", False, 0.0),
    UnitChange("c", 1, "norm", "norm", False, None),
]
RETENTION = {
    "base": {"text_loss": 2.0, "base_kl": 0.0, "facts": 90.0},
    "sft": {"text_loss": 2.5, "base_kl": 0.25, "facts": 80.0},
    "dpo": {"text_loss": None, "base_kl": 0.5, "facts": 85.0},
    "history": {
        "sft": [
            {"step": 0, "text_loss": 2.0, "base_kl": 0.0, "facts": 90.0, "seconds": 1.5},
            {"step": 60, "text_loss": 2.5, "base_kl": 0.25, "facts": 80.0, "seconds": 1.5},
        ],
        "dpo": [
            {"step": 0, "text_loss": 2.5, "base_kl": 0.25, "facts": 80.0, "seconds": 1.5},
            {"step": 60, "text_loss": None, "base_kl": 0.5, "facts": 85.0, "seconds": 1.5},
        ],
    },
}
ODD = {
    "two stages": report(),
    "one stage": report(stage()),
    "full fine-tuning": report(stage(method="fft", selection_digest=None, frozen_unchanged=None)),
    "no evaluation": report(evaluation={}),
    "other measures": report(stage(), evaluation={"base": {"mmlu": 41.0, "gsm8k": None}, "sft": {"gsm8k": 3.5}}),
    "unscored": report(stage(), evaluation={"base": {"knowledge": None}}),
    "no history": report(stage(history=[], moved=[])),
    "one log row": report(stage(history=[{"step": 1, "loss": 2.0}])),
    "nothing moved": report(stage(moved=[UnitChange("a", 0, "norm", "norm", True, 0.0)])),
    "only outside": report(stage(moved=[UnitChange("a", None, "lm_head", "lm_head", True, 0.25)])),
    "unknown movement": report(stage(moved=[UnitChange("a", 0, "norm", "norm", True, None)])),
    "hybrid": report(stage(moved=MIXED)),
    "80 layers": report(stage(moved=moved(80))),
    "experts": report(stage(moved=moved(4, {**SLOTS, **WIDE}))),
    "samples": report(
        stage(moved=[]), samples=[{"prompt": "Q | 1?", "base": "one\ntwo", "sft": "", "dpo": "three " * 60}] * 2
    ),
    "eight rounds": report(*(stage(f"round {n}") for n in range(8))),
    "retention": report(retention=RETENTION),
    "retention of one stage": report(
        retention={"sft": {"facts": 80.0}, "history": {"sft": [{"step": 5, "facts": 80.0}], "dpo": [{"step": 0}]}}
    ),
    "no stage": Report([]),
}

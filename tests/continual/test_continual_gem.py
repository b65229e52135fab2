"""GEM: no step points against what is kept of earlier tasks, the other half stays, and a kill changes no byte."""

import json
import signal
import socket

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from ddp_gem import Steps, rows, shares, steps, trainer
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_continual import flags, left
from test_continual import own as three_tasks
from training import weights
from trl import SFTConfig
from warm import SERVER, Run

from hft_trl import HFTConfig, HFTError
from hft_trl.continual.continual_recipe import parse_continual
from hft_trl.continual.gem import EPSILON, MARGIN, check_gem, multipliers
from hft_trl.continual.rounds import plan_rounds
from hft_trl.continual.tasks import Row, Task

own = three_tasks  # the fixture


@st.composite
def gradients(draw):
    """Memories' gradients, which may be parallel, opposed, zero or of very different lengths, and the current one."""
    count = draw(st.integers(1, 6))
    whole = st.integers(-4, 4).map(float)
    memories = draw(arrays.arrays(np.float64, (count, 8), elements=whole))
    lengths = draw(arrays.arrays(np.float64, count, elements=st.sampled_from([1e-3, 1.0, 1e2])))
    return memories * lengths[:, None], draw(arrays.arrays(np.float64, 8, elements=whole))


@given(gradients())
def test_the_multipliers_are_the_programmes_only_solution(found):
    """Karush, Kuhn and Tucker's conditions, which only the solution of a convex programme meets."""
    memories, current = found
    gram, dots = memories @ memories.T, memories @ current
    v = multipliers(gram, dots)
    if (dots >= 0).all():
        assert not v.any()
        return
    assert (v >= MARGIN).all()
    slope = (gram + EPSILON * np.diag(np.diag(gram))) @ v + dots
    size = np.sqrt(np.diag(gram)) * (np.linalg.norm(current) + np.sqrt(np.diag(gram)) @ v) + 1e-300
    assert (slope >= -1e-7 * size).all()
    free = v > MARGIN * (1 + 1e-6)
    assert (np.abs(slope)[free] <= 1e-6 * size[free]).all()


@given(gradients())
def test_afterwards_no_memory_points_against_the_step(found):
    """But for what the programme's diagonal leaves, a ten-thousandth of what was added."""
    memories, current = found
    v = multipliers(memories @ memories.T, memories @ current)
    step = current + v @ memories
    lengths = np.linalg.norm(memories, axis=1)
    assert (memories @ step >= -2 * EPSILON * lengths * (np.linalg.norm(current) + v @ lengths)).all()


@given(gradients(), st.sampled_from([1e-4, 0.1, 1e3]))
def test_a_loss_in_other_units_gives_the_same_multipliers(found, unit):
    memories, current = found
    gram, dots = memories @ memories.T, memories @ current
    np.testing.assert_allclose(
        multipliers(gram * unit**2, dots * unit**2), multipliers(gram, dots), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("method", ["hft", "fft"])
def test_no_step_raises_the_loss_on_a_memory_that_contradicts_the_task(method, base, tmp_path):
    """To first order, seen by a backward pass of the test's own; also over two micro-batches a step."""
    memory = rows(base, "Lima.", 4)
    made = trainer(base, tmp_path, [memory], HFTConfig(method=method), gradient_accumulation_steps=2, max_steps=8)
    products = []

    def look(model, state):
        given = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        batch = made.data_collator([memory[n] for n in range(4)])
        loss = torch.nn.functional.cross_entropy(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1),
            batch["labels"][:, 1:].flatten(),
        )
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        theirs = dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))
        assert given.keys() == theirs.keys() == set(made.hft_selection.trainable)
        product = sum((given[name] * theirs[name]).sum().item() for name in given)
        length = sum((theirs[name] ** 2).sum().item() for name in given)
        products.append(product / length)

    made.add_callback(Steps(look))
    made.train()
    made.save_model()
    assert len(products) == len(shares(made)) == 8
    assert 1.0 in shares(made)
    # The programme's diagonal leaves a ten-thousandth of what was added
    assert all(product > -10 * EPSILON for product in products), products
    before, after = weights(base), weights(tmp_path)
    moved = {name for name in before if before[name].numpy().tobytes() != after[name].numpy().tobytes()}
    assert moved == set(made.hft_selection.trainable)


def test_where_nothing_conflicts_every_bit_is_that_of_sequential(base, tokenizer, tmp_path):
    """With dropout: the memories' passes draw nothing that a step would have drawn, and leave no gradient behind."""
    tiny_llama(len(tokenizer), attention_dropout=0.2).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    friend = rows(base, "Rome.")  # what is learned anyway
    trained = {}
    for name, memories in (("sequential", None), ("first round", []), ("friend", [friend])):
        made = trainer(
            tmp_path / "base", tmp_path / name, memories, per_device_train_batch_size=16, learning_rate=0.01
        )
        made.train()
        made.save_model()
        trained[name] = weights(tmp_path / name)
    assert shares(made) == [0.0] * 4
    for name in ("first round", "friend"):
        assert all(torch.equal(trained["sequential"][key], trained[name][key]) for key in trained["sequential"])


def test_neither_the_division_of_the_global_batch_nor_checkpointing_changes_a_step(base, tmp_path):
    """A run may go on with other micro-batches: the memories' rows are those of the global batch."""
    memories, gradients = [rows(base, "Lima.", 9), rows(base, "In Ur.", 3)], []
    for number, (batch, accumulated, checkpointing) in enumerate([(8, 1, False), (2, 4, False), (8, 1, True)]):
        made = trainer(
            base,
            tmp_path / str(number),
            memories,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            gradient_checkpointing=checkpointing,
            max_steps=8,
        )
        kept = Steps()
        made.add_callback(kept)
        made.train()
        assert 1.0 in shares(made)
        gradients.append(kept.gradients)
    for other in gradients[1:]:
        for expected, found in zip(gradients[0], other, strict=True):
            assert expected.keys() == found.keys()
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_two_processes_step_as_one(base, tmp_path):
    """DDP: the same gradients of the same global batch and memories, one of which has too few rows for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = SERVER.Process(target=steps, args=(base, tmp_path / "one", {}))
    both = [
        SERVER.Process(
            target=steps, args=(base, tmp_path / "two", {**launched, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        )
        for rank in (0, 1)
    ]
    for process in (alone, *both):
        process.start()
    for process in (alone, *both):
        process.join(120)
    assert [process.exitcode for process in (alone, *both)] == [0, 0, 0]
    one, first, second = (torch.load(tmp_path / name) for name in ("one/0.pt", "two/0.pt", "two/1.pt"))
    assert one["shares"] == first["shares"]
    assert 1.0 in one["shares"]
    for expected, found, other in zip(one["gradients"], first["gradients"], second["gradients"], strict=True):
        assert expected.keys() == found.keys() == other.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)
            assert torch.equal(found[name], other[name])


TASKS = [Task(name, tuple(Row(f"{name} {n}", "a") for n in range(20)), (), "accuracy", 1) for name in "ABC"]


def test_a_task_is_remembered_by_the_same_rows_in_every_later_round():
    rounds = plan_rounds("gem", TASKS, gem_memory=5)
    assert [list(planned.memories) for planned in rounds] == [[], ["A"], ["A", "B"]]
    assert rounds[1].memories["A"] == rounds[2].memories["A"]
    assert len(set(rounds[1].memories["A"])) == 5
    assert set(rounds[1].memories["A"]) <= set(TASKS[0].train)
    assert plan_rounds("gem", TASKS, gem_memory=5) == rounds
    assert plan_rounds("gem", TASKS, gem_memory=5, seed=1)[1].memories != rounds[1].memories
    assert sorted(plan_rounds("gem", TASKS, gem_memory=64)[1].memories["A"]) == sorted(TASKS[0].train)
    plain = plan_rounds("sequential", TASKS)
    assert [planned.rows for planned in rounds] == [planned.rows for planned in plain]
    assert not any(planned.memories for planned in plain)


@pytest.fixture(scope="module")
def two_tasks(own, tmp_path_factory):
    """Flags of a run of two tasks that ask the same and answer otherwise, so that the second unlearns the first."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("Towns", "Moved"):
        (folder / name).mkdir()
        for file in ("train.json", "test.json"):
            content = json.loads((own / "tasks" / "Towns" / file).read_text())
            if name == "Moved":
                content = [{**row, "answer": "Nobody lives there."} for row in content]
            (folder / name / file).write_text(json.dumps(content))
    tasks = [{"name": name, "metric": "accuracy", "epochs": 2} for name in ("Towns", "Moved")]
    (folder / "tasks.yaml").write_text(json.dumps({"tasks": tasks}))

    def words(output, *more):
        return [
            *flags(own, output),
            "--benchmark",
            folder,
            "--approach",
            "gem",
            "--gem_memory",
            8,
            "--sft.learning_rate",
            0.003,
            "--sft.num_train_epochs",
            4,
            "--sft.logging_steps",
            1,
            *more,
        ]

    return words


def test_a_killed_run_ends_in_the_same_bytes_and_keeps_to_its_memory(two_tasks, tmp_path):
    """Killed in the round that has a memory. Before it goes on, another memory is refused."""
    import faults

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Run(tmp_path / "log", "continual", *two_tasks(whole)).finish()
    at = ("os.rename", "*/round-2/checkpoint-4/hft_checkpoint.json")
    run = Run(tmp_path / "died", "continual", *two_tasks(killed), before=faults.at_write, given=at)
    assert run.wait() == [-signal.SIGKILL], run.output()[-3000:]
    other = Run(tmp_path / "other", "continual", *two_tasks(killed, "--gem_memory", 9))
    assert other.wait() == [2]
    assert "made with other settings (data.memory" in other.output()
    Run(tmp_path / "again", "continual", *two_tasks(killed)).finish()
    assert left(whole) == left(killed)
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["approach"] == "gem"
    assert [len(row) for row in scores["matrix"]] == [1, 2]
    (memory,) = whole.glob("round-2-memory-*.json")
    kept = json.loads(memory.read_text())
    assert [row["task"] for row in kept] == ["Towns"] * 8
    state = json.loads((whole / "round-2" / "trainer_state.json").read_text())
    projected = [row["step"] for row in state["log_history"] if row.get("gem_projected_steps")]
    assert projected[-1] > 4  # also after the kill


@pytest.mark.parametrize(
    ("settings", "environment", "complaint"),
    [
        ({"fp16": True}, {}, "fp16 scales gradients"),
        ({"loss_type": "dft"}, {}, "sft.loss_type is 'dft'"),
        ({"label_smoothing_factor": 0.1}, {}, "sft.label_smoothing_factor 0.1"),
        ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 scales gradients"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP shards gradients"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {},
            "set use_reentrant to false",
        ),
        ({"activation_checkpointing_kwargs": {"preserve_rng_state": False}}, {}, "set use_reentrant to false"),
    ],
)
def test_what_gem_cannot_be_right_under_is_refused(settings, environment, complaint, monkeypatch, tmp_path):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    args = SFTConfig(str(tmp_path), **{"use_cpu": True, "bf16": False, **settings})
    with pytest.raises(HFTError, match=complaint):
        check_gem(args)


def test_sharded_by_deepspeed_is_refused(tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    args.deepspeed_plugin = object()
    with pytest.raises(HFTError, match="DeepSpeed shards gradients"):
        check_gem(args)


def test_the_recipe_refuses_it_when_it_is_parsed(own, tmp_path, monkeypatch):
    words = [str(word) for word in flags(own, tmp_path, "--approach", "gem", "--sft.use_cpu", "true")]
    parse_continual([*words, "--sft.bf16", "false"])
    with pytest.raises(HFTError, match="gem_memory is 0"):
        parse_continual([*words, "--gem_memory", "0"])
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(HFTError, match="FSDP shards gradients"):
        parse_continual([*words, "--sft.bf16", "false"])

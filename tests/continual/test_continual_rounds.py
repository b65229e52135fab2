"""What each approach learns in a round, from which model, and what it is asked afterwards."""

from hypothesis import given
from hypothesis import strategies as st

from hft_trl.continual.rounds import plan_rounds
from hft_trl.continual.tasks import Row, Task

TASKS = [
    Task(name, tuple(Row(f"{name} {i}", "a") for i in range(20)), (Row(name, "a"),), "accuracy", epochs)
    for name, epochs in (("A", 1), ("B", 2), ("C", 3))
]
GENERAL = (Row("hello", "hi"),)


def test_sequential_learns_one_task_after_the_other_from_the_last_model():
    rounds = plan_rounds("sequential", TASKS, GENERAL)
    assert [planned.rows for planned in rounds] == [task.train for task in TASKS]
    assert [planned.epochs for planned in rounds] == [1, 2, 3]
    assert [planned.start for planned in rounds] == [None, "round-1", "round-2"]
    assert [planned.evaluated for planned in rounds] == [tuple(TASKS[:1]), tuple(TASKS[:2]), tuple(TASKS)]


def test_individual_learns_each_task_from_the_base_and_asks_about_it_alone():
    rounds = plan_rounds("individual", TASKS, GENERAL)
    assert [planned.rows for planned in rounds] == [task.train for task in TASKS]
    assert [planned.start for planned in rounds] == [None, None, None]
    assert [planned.evaluated for planned in rounds] == [(task,) for task in TASKS]


def test_multitask_learns_all_rows_at_once_each_as_often_as_its_task_has_epochs():
    (only,) = plan_rounds("multitask", TASKS, GENERAL)
    assert only.epochs == 1
    assert only.evaluated == only.tasks == tuple(TASKS)
    assert [only.rows.count(task.train[0]) for task in TASKS] == [1, 2, 3]
    assert len(only.rows) == sum(len(task.train) * task.epochs for task in TASKS)


@given(share=st.sampled_from([0.05, 0.1, 0.5, 1.0]), seed=st.integers())
def test_replay_mixes_a_share_of_each_earlier_task_and_all_general_rows_into_a_round(share, seed):
    rounds = plan_rounds("replay", TASKS, GENERAL, share, seed)
    sequential = plan_rounds("sequential", TASKS)
    for number, (planned, plain) in enumerate(zip(rounds, sequential, strict=True)):
        assert planned.rows[: len(plain.rows)] == plain.rows
        assert (planned.start, planned.epochs, planned.evaluated) == (plain.start, plain.epochs, plain.evaluated)
        mixed = planned.rows[len(plain.rows) :]
        for other in TASKS[:number]:
            drawn = [row for row in mixed if row in other.train]
            assert len(set(drawn)) == len(drawn) == round(20 * share)
        assert len(mixed) == number * round(20 * share) + len(GENERAL)


def test_replay_draws_other_rows_in_each_round_and_the_same_for_the_same_seed():
    first, again, other = (plan_rounds("replay", TASKS, (), 0.5, seed) for seed in (1, 1, 2))
    assert first == again != other
    of_a = [[row for row in planned.rows if row in TASKS[0].train] for planned in first[1:]]
    assert of_a[0] != of_a[1]

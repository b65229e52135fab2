"""
Every task of the suites, on small local data in the schema that its data set has on the hub, asked of a stand-in.
"""

from pathlib import Path

import pytest
from conftest import PATIENCE
from hub import Hub, row

from hft_trl import HFTError
from hft_trl.evaluation.functions import grade_programs, pass_at_k, passes
from hft_trl.evaluation.suites import SUITES, TASKS

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hft_trl.evaluation import harness, run  # noqa: E402

ADD = row("openai/openai_humaneval", 0)


class StandIn(LM):
    """Says what it is told to say, and keeps what it was asked."""

    def __init__(self, reply):
        super().__init__()
        self.reply, self.prompts, self.add_bos_token = reply, [], None

    def loglikelihood(self, requests):
        """The first of the choices is the likeliest."""
        self.prompts += [request.args[0] for request in requests]
        return [(-float(request.idx), True) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        self.prompts += [request.args[0] for request in requests]
        return [self.reply(number) for number, _ in enumerate(requests)]

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history) + "<assistant>"

    tokenizer_name = "stand-in"


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(TASKS))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return Hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def local(monkeypatch, manager, hub):
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", hub.load_dataset)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)


def task(name):
    (found,) = (task for suite in SUITES.values() for task in suite if task.name == name)
    return found


def scores(name, reply, run_code=False, limit=None):
    """The figures of a task, as the tables show them, and the prompts."""
    chosen, model = task(name), StandIn(reply)
    found = harness.ask(model, chosen, harness.load_tasks([chosen])[name], limit, run_code)
    return {heading: run._score(found, figure) for heading, figure in chosen.figures.items()}, model


def test_the_harness_knows_every_task_and_every_figures_task(manager):
    for suite in SUITES.values():
        for entry in suite:
            assert {entry.name, *(figure.partition(" ")[0] for figure in entry.figures.values())} <= {
                *manager.all_tasks
            }


def test_the_suites_are_those_of_the_paper():
    """Chat form for general abilities, plain language for HumanEval and knowledge; examples as the issue says."""
    shown = {suite: [next(iter(task.figures)) for task in tasks] for suite, tasks in SUITES.items()}
    assert shown["general"] == ["MMLU", "GSM8K", "BBH", "TyDiQA", "TruthfulQA", "HumanEval"]
    assert shown["knowledge"] == ["NaturalQuestions", "TriviaQA", "HotpotQA"]
    assert [task.chat for task in SUITES["general"]] == [True] * 5 + [False]
    assert not any(task.chat for task in SUITES["knowledge"])
    assert [task.num_fewshot for task in SUITES["general"][:2]] == [5, 8]


def test_each_file_is_a_task_of_a_suite_or_a_part_of_one(manager):
    used = {task.name for suite in SUITES.values() for task in suite}
    used |= {
        figure.partition(" ")[0] for suite in SUITES.values() for task in suite for figure in task.figures.values()
    }
    assert {path.stem for path in Path(TASKS).glob("*.yaml")} == {name for name in used if name.startswith("hft_")}


@pytest.mark.parametrize(
    ("name", "reply", "value"),
    [
        ("mmlu", None, 0),  # the first choice is wrong
        ("gsm8k_cot", "One and one are 2. The answer is 2.", 100),
        ("gsm8k_cot", "The answer is 3.", 0),
        ("bbh", "So the answer is False.", 100),
        ("truthfulqa_mc2", None, 100 / (1 + 2.718281828459045**-1)),
        ("hft_tydiqa_goldp", "Rome", 100),
        ("hft_tydiqa_goldp", "old Rome", 100 * 2 / 3),
        ("nq_open", " the city of Rome", 100),
        ("nq_open", " Athens", 0),
        ("triviaqa", " Roma", 100),
        ("hft_hotpotqa_closed_book", " rome.", 100),
        ("hft_hotpotqa_closed_book", " Paris", 0),
    ],
)
def test_a_task_reads_the_hubs_schema_and_grades(local, name, reply, value):
    found, _ = scores(name, lambda number: reply, limit=2)
    (score,) = found.values()
    assert score.value == pytest.approx(value)
    assert score.stderr is not None


def test_general_is_asked_in_chat_turns_and_knowledge_in_plain_language(local):
    _, model = scores("gsm8k_cot", lambda number: "", limit=1)
    assert model.prompts[0].count("<user>") == 9  # eight examples and the question
    assert model.add_bos_token is False  # special tokens come from the template alone
    _, model = scores("hft_hotpotqa_closed_book", lambda number: "", limit=1)
    assert "<user>" not in model.prompts[0]
    assert model.prompts[0].count("A: Rome") == 5
    assert model.prompts[0].endswith("Q: 0: Which old city has a colosseum?\nA:")
    assert "Rome is old" not in model.prompts[0]  # closed book
    assert model.add_bos_token is None


def test_every_model_sees_the_same_examples(local):
    chosen = task("nq_open")
    loaded = harness.load_tasks([chosen])["nq_open"]
    prompts = []
    for _ in range(2):
        model = StandIn(lambda number: "")
        harness.ask(model, chosen, loaded, 3, False)
        prompts.append(model.prompts)
    assert prompts[0] == prompts[1]
    assert len(set(prompts[0])) == 3


def test_pass_at_10_is_estimated_from_twenty_programs(local):
    """One right one among twenty is found by half of the draws of ten."""
    right = lambda number: "    return a + b\n" if number % 20 == 3 else "    return a - b\n"  # noqa: E731
    found, model = scores("hft_humaneval", right, run_code=True, limit=1)
    assert found["HumanEval"].value == pytest.approx(50)
    assert model.prompts == [ADD["prompt"]] * 20


def test_code_runs_only_where_it_was_asked_for(local, monkeypatch):
    monkeypatch.setattr("hft_trl.evaluation.functions.subprocess.run", lambda *_, **__: pytest.fail("a program ran"))
    with pytest.raises(ValueError, match="unsafe"):
        scores("hft_humaneval", lambda number: "", run_code=False, limit=1)


def test_data_that_can_not_be_had_is_one_line(monkeypatch, manager):
    """The tests have no network."""
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)
    with pytest.raises(HFTError, match="the task nq_open cannot be set up"):
        harness.load_tasks([task("nq_open")])


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(0)", False),  # ends before its tests
        ("import os; os._exit(0)", False),
        ("syntax error", False),
        ("null\0byte", False),
        ("open('left behind', 'w').write('x')", True),
        ("input()", False),
    ],
)
def test_a_program_passes_when_it_runs_to_its_end(program, passed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hft_trl.evaluation.functions.PROGRAM_SECONDS", PATIENCE)
    assert passes(program) is passed
    assert not list(tmp_path.iterdir())


def test_a_program_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr("hft_trl.evaluation.functions.PROGRAM_SECONDS", 0.5)
    assert passes("while True: pass") is False
    monkeypatch.setattr("hft_trl.evaluation.functions.PROGRAM_SECONDS", 5)  # a busy machine starts one of nine in time
    assert grade_programs(ADD, [["    while True: pass\n"] + [ADD["canonical_solution"]] * 9]) == {"pass@10": 1.0}


def test_pass_at_k_is_the_chance_of_a_draw_without_replacement():
    assert pass_at_k(20, 0, 10) == 0
    assert pass_at_k(20, 1, 10) == 0.5
    assert pass_at_k(20, 11, 10) == 1
    assert pass_at_k(4, 2, 1) == 0.5
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)

"""Nothing is lost: whatever ends a run, and whenever, the same command ends in the same bytes."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from conftest import PATIENCE, started_from, tulu_row, ultrafeedback_row
from warm import ROOT, Run

from hft_trl import demo
from hft_trl.checkpoints.whole import last_whole_checkpoint, torn_because

pytestmark = pytest.mark.long

QUICK = [
    "--sft.split", "train[:64]", "--sft.per_device_train_batch_size", 8, "--sft.max_steps", 6, "--sft.save_steps", 1,
    "--dpo.split", "train_prefs[:32]", "--dpo.per_device_train_batch_size", 4, "--dpo.max_steps", 4,
    "--dpo.save_steps", 1, "--sft.logging_steps", 1, "--dpo.logging_steps", 1,
]  # fmt: skip
HALVES = ["--sft.per_device_train_batch_size", 4, "--dpo.per_device_train_batch_size", 2]  # of the batch, for two
# What a stage's figures owe to the machine and to the session, rather than to the training.
PASSING = {"tokens_per_second", "runtime_seconds", "peak_memory_bytes", "optimizer_state_bytes", "resumed_from_step"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The demo's model under another name, which isn't asked the demo's questions after every run."""
    return Path(shutil.copytree(demo.MODEL, tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def launch(model, tmp_path):
    """Starts the whole recipe in a process of its own; ends what a failed test leaves behind."""
    runs = []

    def start(output, *flags, **how) -> Run:
        runs.append(
            Run(
                tmp_path / f"log{len(runs)}",
                "sft_then_dpo",
                *started_from(model),
                "--output_dir",
                output,
                *QUICK,
                *flags,
                **how,
            )
        )
        return runs[-1]

    yield start
    for run in runs:
        run.send(signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    Run(output.parent / "log", "sft_then_dpo", *started_from(model), "--output_dir", output, *QUICK).finish()
    return output


@pytest.fixture(scope="module")
def whole_of_two(model, tmp_path_factory) -> Path:
    """The same by two processes, on the same global batches."""
    output = tmp_path_factory.mktemp("whole_of_two") / "run"
    flags = [*started_from(model), "--output_dir", output, *QUICK, *HALVES]
    Run(output.parent / "log", "sft_then_dpo", *flags, processes=2).finish()
    return output


def figures(output: Path) -> list[dict]:
    """The report's stages, without what may differ."""
    stages = json.loads((output / "report.json").read_text())["stages"]
    for stage in stages:
        stage["history"] = [(row["step"], row["loss"]) for row in stage["history"] if "loss" in row]
    return [{key: value for key, value in stage.items() if key not in PASSING | {"start_model"}} for stage in stages]


def assert_same(output: Path, whole: Path) -> None:
    for stage in ("sft", "dpo"):
        ours, theirs = (folder / stage / "model.safetensors" for folder in (output, whole))
        assert ours.read_bytes() == theirs.read_bytes(), stage
    assert figures(output) == figures(whole)
    assert all((output / name).stat().st_size > 500 for name in ("report.md", "loss.png", "moved.png", "margins.png"))


def test_twenty_kills_at_random_times_end_in_the_same_bytes(launch, whole, tmp_path):
    """Killed (-9) again and again over both stages, run after run, until there were 20 kills; every run ends whole."""
    chance, kills, stages = random.Random(1), 0, set()
    for number in range(20):
        output, longest = tmp_path / f"run{number}", 2.0
        while True:
            run = launch(output)
            codes = run.wait(chance.uniform(0.3, longest))
            if codes is not None:
                assert codes == [0], run.output()[-3000:]
                break
            run.send(signal.SIGKILL)
            assert run.wait() in ([-signal.SIGKILL], [0])
            kills += run.processes[0].exitcode != 0
            longest += 0.5  # so that it ends, however slow the machine is
            record = output / "sft" / "stage.json"
            stages.add(record.exists() and json.loads(record.read_text())["record"] is not None)
        assert_same(output, whole)
        if kills >= 20:
            break
    assert kills >= 20
    assert stages == {False, True}, "kills hit one stage only"


WRITES = [
    (faults.at_write, ("open", "sft/.stage.json")),
    (faults.at_write, ("os.rename", "sft/stage.json")),
    (faults.at_write, ("os.mkdir", "sft/checkpoint-1")),
    (faults.at_write, ("open", "sft/checkpoint-1/.hft_selection.json")),
    (faults.at_write, ("os.rename", "sft/checkpoint-1/hft_selection.json")),
    (faults.half_written, ("sft/checkpoint-1/model.safetensors",)),
    (faults.half_written, ("sft/checkpoint-1/optimizer.pt",)),
    (faults.half_written, ("sft/checkpoint-2/scheduler.pt",)),
    (faults.half_written, ("sft/checkpoint-2/rng_state.pth",)),
    (faults.at_write, ("open", "sft/checkpoint-2/trainer_state.json")),
    (faults.at_write, ("open", "sft/checkpoint-3/.hft_checkpoint.json")),
    (faults.at_write, ("os.rename", "sft/checkpoint-3/hft_checkpoint.json")),
    (faults.at_write, ("shutil.rmtree", "sft/checkpoint-2")),
    (faults.at_write, ("os.remove", "optimizer.pt")),  # while an old checkpoint is being removed
    (faults.half_written, ("sft/model.safetensors",)),
    (faults.at_write, ("os.rename", "sft/stage.json")),
    (faults.at_write, ("os.mkdir", "dpo/checkpoint-1")),  # after SFT, before anything of DPO is saved
    (faults.half_written, ("dpo/checkpoint-2/optimizer.pt",)),
    (faults.at_write, ("os.rename", "dpo/checkpoint-3/hft_checkpoint.json")),
    (faults.half_written, ("dpo/model.safetensors",)),
    (faults.at_write, ("os.rename", "dpo/stage.json")),
    (faults.at_write, ("open", ".report.json")),
    (faults.at_write, ("os.rename", "report.json")),
    (faults.at_write, ("open", ".moved.png")),
    (faults.at_write, ("os.rename", "report.md")),
]


def test_a_kill_at_each_kind_of_write_is_mended_by_the_next_run(launch, whole, tmp_path):
    """In one folder, one after the other; every time the newest whole checkpoint is left, and nothing torn is used."""
    output = tmp_path / "run"
    for before, given in WRITES:
        run = launch(output, before=before, given=given)
        assert run.wait() == [-signal.SIGKILL], (given, run.output()[-2000:])
    launch(output).finish()
    assert_same(output, whole)
    assert {path.name for path in (output / "sft").glob("_torn-*")} >= {"_torn-checkpoint-1", "_torn-checkpoint-2"}
    assert torn_because(last_whole_checkpoint(output / "dpo")) is None


def test_kills_of_one_of_two_processes_end_in_the_same_bytes(launch, whole_of_two, tmp_path):
    """One process dies and its launcher kills the other: while both train, and while a checkpoint is half there."""
    output = tmp_path / "run"
    for before, given in (
        (faults.signal_in_step, ("sft", 3, signal.SIGKILL, 1)),
        (faults.half_written, ("sft/checkpoint-4/rng_state_1.pth",)),
        (faults.half_written, ("dpo/checkpoint-2/rng_state_0.pth",)),
    ):
        run = launch(output, *HALVES, processes=2, before=before, given=given)
        while all(process.exitcode is None for process in run.processes):
            time.sleep(0.01)
        run.send(signal.SIGKILL)
        assert -signal.SIGKILL in run.wait()
    launch(output, *HALVES, processes=2).finish()
    assert_same(output, whole_of_two)


@pytest.mark.parametrize(("stage", "step"), [("sft", 3), ("dpo", 2)])
def test_sigterm_saves_at_the_steps_end_and_the_same_command_ends_in_the_same_bytes(
    launch, whole, tmp_path, stage, step
):
    flags = ["--sft.save_steps", 100, "--dpo.save_steps", 100]
    run = launch(tmp_path / "run", *flags, before=faults.signal_in_step, given=(stage, step, signal.SIGTERM))
    assert run.wait() == [143], run.output()[-2000:]
    folder = tmp_path / "run" / stage
    assert run.output().splitlines()[-1] == (
        f"stopped: SIGTERM; saved checkpoint-{step} in {folder}, the same command resumes from it."
    )
    assert last_whole_checkpoint(folder) == str(folder / f"checkpoint-{step}")
    assert "Traceback" not in run.output()
    assert not (folder / "model.safetensors").exists()
    launch(tmp_path / "run", *flags).finish()
    assert_same(tmp_path / "run", whole)


def test_sigterm_outside_of_training_ends_with_the_same_code_and_nothing_torn(launch, whole, tmp_path):
    """
    While folders are opened, between training and the saved model, while the next stage starts, and in the report.
    """
    for path in ("sft/.stage.json", "sft/config.json", "dpo/README.md", ".report.md"):
        run = launch(tmp_path / "run", before=faults.at_write, given=("open", path, 1, signal.SIGTERM))
        assert run.wait() == [143], (path, run.output()[-2000:])
        assert "Traceback" not in run.output()
    launch(tmp_path / "run").finish()
    assert_same(tmp_path / "run", whole)


@pytest.mark.e2e
def test_a_recipe_saves_when_its_launcher_gets_the_sigterm(model, tmp_path):
    """`accelerate launch` of one process ends without passing it on, nor waiting."""
    single = ["--config_file", "accelerate_configs/single.yaml", "recipes/sft_then_dpo.py"]
    flags = [*started_from(model), "--output_dir", tmp_path / "run", *QUICK, "--sft.max_steps", 100000]
    command = [sys.executable, "-m", "accelerate.commands.launch", *single, *flags]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=log, stderr=log)
    while last_whole_checkpoint(tmp_path / "run" / "sft") is None:
        assert launcher.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)
    launcher.terminate()
    assert launcher.wait(PATIENCE) == -signal.SIGTERM
    deadline = time.monotonic() + PATIENCE
    while "stopped: SIGTERM; saved checkpoint-" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(launch, whole_of_two, tmp_path):
    output = tmp_path / "run"
    run = launch(output, *HALVES, processes=2, before=faults.signal_in_step, given=("sft", 3, signal.SIGTERM, 1))
    assert run.wait(120) == [143, 143], run.output()[-2000:]
    assert last_whole_checkpoint(output / "sft") == str(output / "sft" / "checkpoint-3")
    launch(output, *HALVES, processes=2).finish()
    assert_same(output, whole_of_two)


def test_no_process_ends_before_the_checkpoint_is_on_the_disk(launch, tmp_path):
    """A launcher kills the first process, which writes it, 30 seconds after another one has ended."""
    sft = tmp_path / "run" / "sft"
    flags = [*HALVES, "--sft.save_steps", 100]
    run = launch(tmp_path / "run", *flags, processes=2, before=faults.slow_disk, given=("sft", 3, 3))
    run.processes[1].join(300)
    assert last_whole_checkpoint(sft) == str(sft / "checkpoint-3"), run.output()[-2000:]
    assert run.wait() == [143, 143]


def one_error(run: Run) -> str:
    """The one line of a run that ended in a user's error."""
    assert run.wait() == [2], run.output()[-3000:]
    errors = [line for line in run.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in run.output()
    return errors[0]


@pytest.mark.parametrize(("largest", "file"), [(2_000_000, "model.safetensors"), (4_000_000, "optimizer.pt")])
def test_files_that_can_not_be_written_in_full_stop_the_run_in_one_line(launch, whole, tmp_path, largest, file):
    """
    The kernel refuses more bytes than the limit (EFBIG).

    Safetensors' writer and torch's both say it in one line.
    """
    sft = tmp_path / "run" / "sft"
    run = launch(tmp_path / "run", before=faults.full_from_step, given=("sft", 3, largest))
    error = one_error(run)
    assert f"{sft / 'checkpoint-3'} cannot be written" in error
    assert "run the same command again" in error
    assert last_whole_checkpoint(sft) == str(sft / "checkpoint-2")
    launch(tmp_path / "run").finish()
    assert_same(tmp_path / "run", whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB: room for two checkpoints and not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_in_one_line_and_room_lets_it_go_on(launch, whole, small_disk):
    error = one_error(launch(small_disk / "run", "--sft.save_total_limit", 9))
    assert "MB are free there" in error
    assert float(error.partition(" MB are free")[0].rpartition(" ")[2]) < 5
    kept = last_whole_checkpoint(small_disk / "run" / "sft")
    assert kept is not None
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    launch(small_disk / "run", "--sft.save_total_limit", 9).finish()
    assert_same(small_disk / "run", whole)


def test_a_read_only_folder_is_refused_before_training_and_leaves_the_checkpoints(launch, whole, small_disk):
    output = small_disk / "run"
    assert launch(output, before=faults.signal_in_step, given=("sft", 3, signal.SIGKILL)).wait() == [-signal.SIGKILL]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    error = one_error(launch(output))
    assert str(output / "sft") in error
    assert "Read-only file system" in error
    assert last_whole_checkpoint(output / "sft") == str(output / "sft" / "checkpoint-2")
    subprocess.run(["mount", "-o", "remount,rw,size=200m", str(small_disk)], check=True)
    launch(output).finish()
    assert_same(output, whole)


def test_a_data_file_that_vanishes_stops_the_next_run_in_one_line_and_its_return_lets_it_go_on(launch, tmp_path):
    """Gone while SFT trains, the run itself goes on with the rows that it has; the next one asks for the file."""
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    chats.write_text("\n".join(json.dumps(tulu_row(number)) for number in range(64)))
    pairs.write_text("\n".join(json.dumps(ultrafeedback_row(number)) for number in range(64)))
    flags = ["--sft.dataset", chats, "--sft.split", "train", "--dpo.dataset", pairs, "--dpo.split", "train"]
    content = chats.read_bytes()
    launch(tmp_path / "whole", *flags, before=faults.vanish_in_step, given=("sft", 2, str(chats))).finish()
    assert not chats.exists()
    chats.write_bytes(content)
    output = tmp_path / "run"
    launch(output, *flags, before=faults.signal_in_step, given=("sft", 4, signal.SIGKILL)).wait()
    chats.unlink()
    assert str(chats) in one_error(launch(output, *flags))
    assert last_whole_checkpoint(output / "sft") == str(output / "sft" / "checkpoint-3")
    chats.write_bytes(content)
    launch(output, *flags).finish()
    for stage in ("sft", "dpo"):
        ours, theirs = (folder / stage / "model.safetensors" for folder in (output, tmp_path / "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_another_number_of_processes_goes_on_with_the_same_global_batch(launch, whole, tmp_path, first, then):
    """Over DDP: the same losses within rounding and a warning about the bits; another global batch is refused."""
    output, batch = tmp_path / "run", {1: [], 2: HALVES}
    run = launch(
        output, *batch[first], processes=first, before=faults.signal_in_step, given=("sft", 4, signal.SIGTERM)
    )
    assert run.wait() == [143] * first, run.output()[-2000:]
    other = one_error(launch(output, "--sft.per_device_train_batch_size", 16))
    assert "sft.global_batch_size 8 there, 16 here" in other
    said = launch(output, *batch[then], processes=then).finish()
    assert f"was saved by {first} process" in said
    assert "same bits" in said
    report, expected = (json.loads((path / "report.json").read_text()) for path in (output, whole))
    assert report["num_processes"] == then
    for ours, theirs in zip(figures(output), figures(whole), strict=True):
        assert [step for step, _ in ours["history"]] == [step for step, _ in theirs["history"]]
        assert [loss for _, loss in ours["history"]] == pytest.approx(
            [loss for _, loss in theirs["history"]], abs=2e-4
        )
    assert expected["num_processes"] == 1


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_one_lives(launch, whole, tmp_path):
    """And no longer: the kernel lets go of the lock even of a process that was killed."""
    output = tmp_path / "run"
    first = launch(output, "--sft.max_steps", 100000, "--sft.save_steps", 100000)
    while not (output / "dpo" / "stage.json").exists():
        assert first.wait(0.05) is None
    assert f"in use by process {first.processes[0].pid} on " in one_error(launch(output))
    first.send(signal.SIGKILL)
    first.wait()
    launch(output, "--overwrite").finish()
    assert_same(output, whole)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_with_overwrite_leaves_the_finished_stage_of_the_first_alone(launch, tmp_path):
    """While the first one trains its second stage from it, and evaluates and reports both."""
    output = tmp_path / "run"
    first = launch(output, "--dpo.max_steps", 100000, "--dpo.save_steps", 100000)
    record = output / "sft" / "stage.json"
    while not record.exists() or json.loads(record.read_text())["record"] is None:
        assert first.wait(0.05) is None
    before = contents(output / "sft")
    assert output / "sft" / "model.safetensors" in before
    assert f"in use by process {first.processes[0].pid} on " in one_error(launch(output, "--overwrite"))
    assert contents(output / "sft") == before
    assert first.wait(0.05) is None

"""accelerate_configs/: every file is one that accelerate accepts, says what it is for, and launches what it says."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import PATIENCE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "accelerate_configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


def header(path: Path) -> str:
    text = re.sub(r" \\\n#? *", " ", path.read_text())  # commands over several lines
    lines = text.removeprefix("#!/bin/bash\n").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("# "))])


def test_there_is_one_for_every_backend():
    names = {path.stem for path in CONFIGS}
    assert names >= {"single", "cpu2", "ddp", "fsdp2", "zero2", "zero3", "ddp_multi_node", "fsdp2_multi_node"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_accepts_it(path):
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "cpu2": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == kind.get(path.stem.removesuffix("_multi_node"), "NO")
    assert config.num_machines == (2 if path.stem.endswith("multi_node") else 1)
    if config.num_processes > 1 and config.num_machines == 1:
        assert config.main_process_port == 0  # any free one, so that two runs on one machine don't collide


@pytest.mark.parametrize("path", [*CONFIGS, FOLDER / "slurm.sh"], ids=lambda path: path.name)
def test_its_header_says_for_which_model_and_machine_and_how_to_launch(path):
    text = header(path)
    assert re.search(r"GPU|CPU", text)
    assert re.search(r"\d+B|demo", text)
    (command,) = re.findall(r"^#   ((?:accelerate launch|sbatch) .+)$", text, re.MULTILINE)
    assert f"accelerate_configs/{path.name}" in command
    files = re.findall(r"\S+\.(?:py|yaml|sh)", command)
    assert any(file.startswith("recipes/") for file in files)
    assert all((ROOT / file).is_file() for file in files)


def test_slurm_names_what_a_cluster_asks_for():
    """A log in one known file, and a line to uncomment for the partition, the account and the environment."""
    lines = (FOLDER / "slurm.sh").read_text().splitlines()
    assert "#SBATCH --output=slurm-%x-%j.log" in lines
    for start in ("##SBATCH --partition=", "##SBATCH --account=", "# module load", "# source ", "# export HF_HOME="):
        assert [line for line in lines if line.startswith(start)], start


@pytest.fixture
def slurm(tmp_path):
    """The Slurm script, among stand-ins for Slurm's commands and `accelerate` that write down how they are called."""
    calls = tmp_path / "calls"
    stand_ins = {
        "scontrol": 'echo "scontrol $*" >> "$CALLS"; if [ "$1" = show ]; then echo node1; echo node2; fi',
        # Both tasks at once. Like the real one (srun_job.c, _srun_signal_mgr), it answers SIGTERM by killing them.
        "srun": 'trap \'kill -KILL $a $b\' TERM; SLURM_NODEID=0 "$@" & a=$!; SLURM_NODEID=1 "$@" & b=$!; wait; wait; exit 3',
        "accelerate": 'trap \'echo stopped >> "$CALLS"; exit 1\' TERM; echo "accelerate $* timeout $PET_SHUTDOWN_TIMEOUT" '
        '>> "$CALLS"; for i in $(seq "$SECONDS_TO_TRAIN"); do sleep 0.1; done',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "POLL_SECONDS": "0.1",
    }

    def start(tenths_of_a_second):
        command = ["bash", FOLDER / "slurm.sh", "recipes/sft.py", "--dataset_name", "two words"]
        environment = {**os.environ, **variables, "SECONDS_TO_TRAIN": str(tenths_of_a_second)}
        return subprocess.Popen(command, env=environment, start_new_session=True), calls

    return start


def test_slurm_launches_once_on_each_machine_with_its_rank(slurm):
    job, calls = slurm(1)
    assert job.wait(timeout=PATIENCE) == 3  # the exit code of srun
    lines = calls.read_text().splitlines()
    launches = sorted(line for line in lines if line.startswith("accelerate"))
    assert [re.search(r"--machine_rank (\d)", line)[1] for line in launches] == ["0", "1"]
    for line in launches:
        assert "--config_file accelerate_configs/fsdp2_multi_node.yaml" in line
        assert "--num_machines 2 --num_processes 8" in line
        assert "--main_process_ip node1 recipes/sft.py --dataset_name two words timeout 540" in line
    assert not any("requeue" in line for line in lines)


@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGTERM], ids=["time is up", "pre-empted"])
def test_slurm_passes_a_warning_on_waits_for_the_end_and_queues_the_job_again(slurm, warning):
    job, calls = slurm(10 * PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while not calls.exists() or calls.read_text().count("accelerate") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(warning)
    assert job.wait(timeout=PATIENCE) == 3
    lines = calls.read_text().splitlines()
    assert lines.count("stopped") == 2
    assert lines[-1] == "scontrol requeue 7"
    assert not list(ROOT.glob(".stop-*"))


WITH_CONFIG = [path for path in (*CONFIGS, FOLDER / "slurm.sh") if "--config recipes/configs/" in path.read_text()]


@pytest.mark.parametrize("path", WITH_CONFIG, ids=lambda path: path.name)
def test_the_line_in_a_header_keeps_the_global_batch_of_the_recipe_s_config(path):
    """Learning rates are for the batch that the config names, whatever the number of processes."""
    text = re.sub(r" \\\n#? *", " ", path.read_text())
    line = next(line for line in text.splitlines() if line.startswith("#   "))
    config = re.search(r"--config (recipes/configs/\S+)", line)
    launch = FOLDER / "fsdp2_multi_node.yaml" if path.suffix == ".sh" else path
    processes = yaml.safe_load(launch.read_text())["num_processes"]
    recipe = (ROOT / config[1]).read_text()
    named = [int(number) for number in re.findall(r"# Global batch (\d+) =", recipe)]
    for stage, batch in zip(("sft", "dpo"), named, strict=True):
        settings = yaml.safe_load(recipe)[stage]
        given = re.search(rf"--{stage}\.gradient_accumulation_steps (\d+)", line)
        accumulation = int(given[1]) if given else settings["gradient_accumulation_steps"]
        assert processes * settings["per_device_train_batch_size"] * accumulation == batch

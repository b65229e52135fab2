"""The runner of experiments: points are made once, a killed run resumes, and no finished point is lost."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import PATIENCE

from hft_trl import HFTError
from hft_trl.experiments.runner import Point, result_file, run_points

WRITE = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps(sys.argv[2]))"


def writes(output, name, value="done", before=""):
    """A point that writes its result itself, after some other statements."""
    return Point(
        name,
        (sys.executable, "-c", f"{before}\n{WRITE}", str(result_file(output, name)), value),
        result_file(output, name),
    )


def made(points, output, workers=2):
    return [point.name for point in run_points(points, output, workers)]


def test_finished_points_are_not_made_again(tmp_path):
    assert sorted(made([writes(tmp_path, name) for name in "ab"], tmp_path)) == ["a", "b"]
    assert made([writes(tmp_path, name, "again") for name in "abc"], tmp_path) == ["c"]
    assert [json.loads(result_file(tmp_path, name).read_text()) for name in "abc"] == ["done", "done", "again"]


def test_a_point_that_a_signal_ends_is_started_again_once(tmp_path):
    first = f"import os; new = not os.path.exists({str(tmp_path / 'seen')!r}); open({str(tmp_path / 'seen')!r}, 'w')\n"
    assert made([writes(tmp_path, "a", before=f"{first}if new: os.kill(os.getpid(), 9)")], tmp_path) == ["a"]
    with pytest.raises(HFTError, match=r"ended with -9\. .*b\.log ends with: nothing"):
        made([writes(tmp_path, "b", before="import os; os.kill(os.getpid(), 9)")], tmp_path)


def test_a_point_without_its_result_is_named(tmp_path):
    with pytest.raises(HFTError, match="ended without its result"):
        made([Point("a", (sys.executable, "-c", "pass"), tmp_path / "missing")], tmp_path)


def test_a_killed_runner_leaves_no_process_and_the_next_call_makes_what_is_missing(tmp_path):
    started = str(tmp_path / "started")
    slow = f"import os, time; open({started!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    script = (
        "import pathlib; from hft_trl.experiments.runner import Point, run_points\n"
        f"output = pathlib.Path({str(tmp_path)!r}); PosixPath = pathlib.PosixPath\n"
        f"list(run_points([{writes(tmp_path, 'a')!r}, {writes(tmp_path, 'b', before=slow)!r}], output, 1))"
    )
    run = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    child = int((tmp_path / "started").read_text())
    while os.path.exists(f"/proc/{child}") and sys.platform == "linux":  # noqa: PTH110
        assert time.monotonic() < deadline, "its process lives on"
        time.sleep(0.05)
    assert made([writes(tmp_path, name) for name in "ab"], tmp_path) == ["b"]


def test_a_caller_that_stops_ends_the_other_processes(tmp_path):
    """An exception in the caller, such as that of a SIGTERM, closes the runner."""
    started, ended = tmp_path / "started", tmp_path / "ended"
    slow = (
        "import pathlib, signal, sys, time\n"
        f"def end(*_): pathlib.Path({str(ended)!r}).touch(); sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, end); pathlib.Path({str(started)!r}).touch(); time.sleep(3600)"
    )
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(started)!r}).exists(): time.sleep(0.01)"
    points = [writes(tmp_path, "a", before=wait), writes(tmp_path, "b", before=slow)]
    running = run_points(points, tmp_path, 2)
    assert next(running).name == "a"
    running.close()
    assert ended.exists()


def test_each_process_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    """A finished process hands its GPU to the next one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    wait = (
        "import json, os, pathlib, sys, time\n"
        "file = pathlib.Path(sys.argv[1]); begin = time.time(); time.sleep(0.2)\n"
        "file.write_text(json.dumps([os.environ['CUDA_VISIBLE_DEVICES'], begin, time.time()]))"
    )
    files = {name: result_file(tmp_path, name) for name in "abcd"}
    points = [Point(name, (sys.executable, "-c", wait, str(file)), file) for name, file in files.items()]
    made(points, tmp_path, workers=None)
    times = [json.loads(file.read_text()) for file in files.values()]
    assert {gpu for gpu, _, _ in times} == {"3", "5"}
    for gpu in ("3", "5"):
        spans = sorted((begin, end) for own, begin, end in times if own == gpu)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))

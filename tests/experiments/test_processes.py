"""Work shared out to processes: its order, and how the processes end."""

import functools
import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.common.processes import in_processes


def a_megabyte(number):
    return bytes([number]) * 2**20


def process_id(number):
    return os.getpid()


def failing(number):
    return 1 // (2 - number)


def ended(process):
    """Whether there is no such process any more; one that its parent has not asked after counts as ended."""
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_results_come_in_order():
    assert [result[0] for result in itertools.islice(in_processes(a_megabyte, 3), 20)] == list(range(20))


@pytest.mark.timeout(60)
def test_closing_does_not_wait_for_results_that_nobody_reads():
    """Results larger than a pipe's buffer, 64 KB, are on their way whenever the iterator is closed."""
    for taken in (1, 2, 3):
        results = in_processes(a_megabyte, 2)
        for _ in range(taken):
            next(results)
        results.close()


def test_an_error_reaches_the_caller():
    results = in_processes(failing, 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="asks /proc which processes live")
def test_processes_end_with_a_parent_that_is_killed():
    code = (
        "import time; from experiments.common.processes import in_processes; from tests.experiments.test_processes "
        "import process_id; results = in_processes(process_id, 1); print(next(results), flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        child = int(parent.stdout.readline())
        assert not ended(child)
        parent.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 30
        while not ended(child) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended(child)


WORK = """
import os, sys
def imported(number):
    return [name for name in ("heavy", "jax", "work") if name in sys.modules], os.environ.get("OMP_NUM_THREADS")
"""

HEAVY = """
import sys
import jax  # as the training runs do
from experiments.common.processes import in_processes
from work import imported

if __name__ == "__main__":
    specification = sys.modules["__main__"].__spec__
    results = in_processes(imported, 1)
    print(next(results), "jax" in sys.modules, sys.modules["__main__"].__spec__ is specification)
    results.close()
"""


@pytest.mark.parametrize("way", [["-m", "heavy"], ["heavy.py"]])
def test_processes_do_not_import_the_main_module(tmp_path, way):
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "heavy.py").write_text(HEAVY)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, *way]
    found = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout == "(['work'], '1') True True\n"


def test_a_function_of_the_main_module_is_refused(monkeypatch):
    monkeypatch.setattr(process_id, "__module__", "__main__")
    with pytest.raises(ValueError, match=r"function must be one of a module .* Define it in a file of its own\."):
        in_processes(functools.partial(process_id), 1)

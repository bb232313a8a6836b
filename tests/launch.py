"""Starting scripts, most of them of tests/isolated, in several processes."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = "torch.distributed.run"
ACCELERATE = "accelerate.commands.launch"
SECONDS = 240


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


class Forks:
    """The process of ``forks.py``, started when it is first needed; one for all tests of this process."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        atexit.register(self.end)

    def started(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks"],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # so that it is ended with its children
            )
        return self.process

    def end(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def run(self, processes: int, arguments: list[str]) -> str:
        """What the processes printed. The failure of one, or no end in ``SECONDS``, is the test's."""
        fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GROUP_RANK": "0"}
        fixed |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        environments = [
            {**_environment(), **fixed, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)
        ]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "output")
            output.touch()
            process = self.started()
            assert process.stdin is not None and process.stdout is not None
            request = {"arguments": arguments, "environments": environments, "output": str(output)}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answered, _, _ = select.select([process.stdout], [], [], SECONDS)
            line = process.stdout.readline() if answered else ""
            if not line:
                self.end()
            printed = output.read_text()
        assert line, f"{arguments} did not end: {printed}"
        assert json.loads(line) == [0] * processes, printed
        return printed


FORKS = Forks()


def launch(processes: int, *arguments: object, launcher: str | None = None) -> str:
    """Run a script with its arguments in so many processes; what it printed. Its failure is the test's.

    Without a launcher they are forked from a process that has imported torch, with the variables that torchrun sets;
    with one they are started as a user does.
    """
    if launcher is None:
        return FORKS.run(processes, [*map(str, arguments)])
    if launcher == TORCHRUN:
        options: tuple[str, ...] = (f"--nproc_per_node={processes}", f"--master_port={free_port()}")
    else:
        # "multi_gpu" means torchrun: its own way to several processes without GPUs is mpirun
        several = ("--multi_gpu",) if processes > 1 else ("--cpu",)
        options = (*several, f"--num_processes={processes}", f"--main_process_port={free_port()}")
    done = subprocess.run(
        [sys.executable, "-m", launcher, *options, *map(str, arguments)],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

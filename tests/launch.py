"""Starting scripts of tests/isolated in several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = "torch.distributed.run"
ACCELERATE = "accelerate.commands.launch"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(processes: int, *arguments: object, launcher: str = TORCHRUN, options: tuple[str, ...] = ()) -> str:
    """Run a script with its arguments in so many processes; what it printed. Its failure is the test's."""
    if launcher == TORCHRUN:
        options = (f"--nproc_per_node={processes}", f"--master_port={free_port()}", *options)
    else:
        # "multi_gpu" means torchrun: its own way to several processes without GPUs is mpirun
        several = ("--multi_gpu",) if processes > 1 else ("--cpu",)
        options = (*several, f"--num_processes={processes}", f"--main_process_port={free_port()}", *options)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", launcher, *options, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

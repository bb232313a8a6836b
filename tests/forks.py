"""A process that has imported what the tests' scripts need, and forks one of itself for each process that runs one.

Importing torch, transformers and accelerate takes five seconds, and torchrun imports torch once more: with some forty
such processes that was most of their time. ``python -m tests.forks`` reads a line of JSON for each start, from
``launch.py``, and answers with the children's exit statuses; what they print goes to a file.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from importlib.util import find_spec
from typing import Any

IMPORTED = (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "accelerate",
    "datasets",
    "transformers.trainer",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "meft_kernels",
    "tests.models",
)


def as_script(arguments: list[str], environment: dict[str, str], output: str) -> int:
    """What ``python SCRIPT ...`` does, in this process; its exit status."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, opened in enumerate((nothing, file, file)):
        os.dup2(opened, number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(arguments: list[str], environment: dict[str, str], output: str) -> int:
    """The process that runs a script."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = as_script(arguments, environment, output)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # never into the loop below


def statuses(children: set[int]) -> list[int]:
    """Those of all children. Where one fails the others, who may wait for it, are ended, as torchrun does."""
    found = []
    while children:
        child, status = os.wait()
        children.discard(child)
        found.append(os.waitstatus_to_exitcode(status))
        if found[-1] != 0:
            for other in children:
                os.kill(other, signal.SIGKILL)
    return found


def main() -> None:
    for name in IMPORTED:
        if find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or a child's first collection copies all of it
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        children = {
            forked(request["arguments"], environment, request["output"]) for environment in request["environments"]
        }
        answers.write(json.dumps(statuses(children)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

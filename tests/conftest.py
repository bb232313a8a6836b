"""No network; one thread a worker: small tensors gain nothing from more, and workers would fight for the cores."""

import gc
import os

# What is not there is not asked for over the network, five times each with a pause.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, too
    import torch

    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported is not looked through again by every full collection, which was a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extensions see leaks when the interpreter ends

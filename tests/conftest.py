"""No network; one thread a worker: small tensors gain nothing from more, and workers would fight for the cores."""

import os

# What is not there is not asked for over the network, five times each with a pause.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start, too
    import torch

    torch.set_num_threads(1)

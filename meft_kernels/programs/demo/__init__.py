"""The demonstration behind ``meft-kernels demo``: a real model, real reviews, and the figures side by side."""

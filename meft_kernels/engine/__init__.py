"""The reversible engine: streams, lanes, layers, and the autograd Functions that tie them together."""

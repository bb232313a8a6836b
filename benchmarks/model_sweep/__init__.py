"""Every model type of transformers, tiny and random, through ``patch``: which pass, which are refused, and why."""

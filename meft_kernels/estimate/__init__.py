"""How much memory fine-tuning takes, from a model's config alone: a training step on tensors without data."""

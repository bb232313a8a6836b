"""MEFT beside what people would use instead, on the same models, texts, batches and optimiser."""

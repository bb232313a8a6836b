"""What users are told of a patched model, and while it trains."""

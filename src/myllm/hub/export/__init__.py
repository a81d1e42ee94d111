"""Weights in formats other tools read. Each export is verified before it gets its name."""

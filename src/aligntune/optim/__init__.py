"""Optimisers of our own, beside those of transformers."""

"""Which kernels carry the heavy operations: attention without padding, losses without logits, compiled layers."""

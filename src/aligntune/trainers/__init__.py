"""The loops, on `transformers.Trainer`: they know no algorithm by name."""

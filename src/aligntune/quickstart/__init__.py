"""The embedded default: a small model and a task that ship with the package, for a first run without a network."""

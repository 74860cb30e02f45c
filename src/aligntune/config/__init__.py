"""The config is the specification: what can be set, what it means, and which value holds."""

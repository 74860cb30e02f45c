"""The import path that the parameter reference names."""

"""Runs in other processes than this one: what is started, how it is watched, and what comes back."""

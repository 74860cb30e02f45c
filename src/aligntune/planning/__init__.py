"""What will a run need? Memory, steps and disk from the config alone, before anything is loaded."""

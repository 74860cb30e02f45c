"""Who loads the model and which trainer runs: TRL, Unsloth, native; selection with reasons."""

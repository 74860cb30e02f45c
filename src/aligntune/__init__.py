"""AlignTune: one config and one command for supervised fine-tuning, reward models and RL alignment."""

"""How good is the model? Labels, preferences, perplexity, and the quality of answers it writes."""

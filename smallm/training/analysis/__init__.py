"""Statistics of the training text, baselines and memorisation."""

"""The layout of a run folder, its state file and its summary."""

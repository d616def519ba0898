"""CPU kernels in C, compiled at the first training run."""

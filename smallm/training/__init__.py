"""Training: everything that imports torch and accelerate."""

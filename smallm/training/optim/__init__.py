"""Optimizers, learning-rate schedules and the guard against non-finite gradients."""

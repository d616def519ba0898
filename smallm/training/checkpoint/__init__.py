"""Checkpoint folders: format, selection and safe loading."""

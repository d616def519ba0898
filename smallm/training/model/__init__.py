"""The Transformer, its operations and their compiled CPU kernels."""

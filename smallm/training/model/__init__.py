"""The Transformer, its operations and its CPU kernels."""

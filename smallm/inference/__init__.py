"""Runs an exported model: the wrapper of ONNX Runtime, the KV cache, and the loss of a text."""

"""Export: everything that imports onnx."""

"""What an exported model file contains, and the check of a file before ONNX Runtime opens it."""

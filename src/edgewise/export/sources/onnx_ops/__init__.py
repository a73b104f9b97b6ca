"""The operators of ONNX in torch, and those on shapes in numpy."""

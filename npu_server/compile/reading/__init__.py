"""ONNX bytes to operations.

`model` reads, `constants` evaluates what depends on no input, `importer` and `operators` turn the nodes.
"""

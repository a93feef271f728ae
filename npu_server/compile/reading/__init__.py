"""ONNX bytes to operations.

`model` reads, `inputs` takes the model's inputs, `constants` holds what depends on none of them
(`single_node` evaluates it), `importer` walks the nodes, `operators` tells what each means, and `host_region`
takes those that the NPU lacks.
"""

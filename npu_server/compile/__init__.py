"""From a float ONNX model and activation ranges to layers that an INT8 NPU executes.

The way: `model` reads the bytes, `constants` evaluates what depends on no input, `importer` turns nodes into
operations, `fusion` merges them, `lowering` gives every tensor its scale, `program` holds weights and runs
layer by layer.
"""

"""From a float ONNX model and activation ranges to layers that an INT8 NPU executes.

The way: `model` reads the bytes, `constants` evaluates what depends on no input, `importer` and `operators`
turn nodes into operations, `fusion` merges them, `lowering` gives every tensor its scale, `weights` quantizes
what is trained, `program` runs layer by layer.
"""

"""From a float ONNX model and activation ranges to the plan of layers that an INT8 NPU executes.

`graph` holds the operations that a network is made of. `reading` turns ONNX nodes into them, `planning`
merges them, gives every tensor its scale and quantizes what is trained. `npu_server.execution` runs the plan.
"""

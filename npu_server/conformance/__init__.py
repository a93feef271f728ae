"""The suite that every backend must pass, ours or a vendor's: `npu-server conformance --backend NAME`.

Its checks look from outside: expectations come from `reference` or ONNX Runtime, and what one method of a
backend says is compared with what another does, so that a broken method cannot vouch for itself.
"""

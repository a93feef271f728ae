"""Server side of NPU-in-the-Loop: an NPU as a quantized forward service."""

"""What talks to the NPU: NumPy in, NumPy out, no torch.

`session` is what the rest of the client sees of it.
"""

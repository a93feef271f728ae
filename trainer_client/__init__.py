"""Client side of NPU-in-the-Loop: train a PyTorch model against the arithmetic of an NPU."""

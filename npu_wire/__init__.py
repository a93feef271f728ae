"""What server and client of NPU-in-the-Loop must agree on: schema, tensor encoding, quantize rule, errors."""

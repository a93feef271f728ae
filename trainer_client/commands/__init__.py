"""`npu-trainer`: the loop, the experiments and their pictures."""

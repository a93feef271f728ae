"""The core: a PyTorch model whose forward is the NPU's.

No network here; it meets the NPU through `trainer_client.npu.session`.
"""

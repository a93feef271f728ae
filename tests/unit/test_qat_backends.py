"""Training against the server's own backends, in one process."""

import pytest
import torch
from in_process_npu import InProcessNpu
from small_nets import images, residual_net
from torch import Tensor, nn

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import Backend, BackendOptions
from trainer_client.qat.module import prepare

LABELS = torch.arange(8) % 5


def _trained(backend: Backend, steps: int) -> tuple[dict[str, Tensor], Tensor]:
    """State dict and evaluation output after some steps of Adam."""
    backend.open()
    npu = InProcessNpu(backend)
    net = residual_net()
    qat = prepare(net, images(1), npu).calibrate(images(16))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(qat(images(8, seed=step)), LABELS).backward()
        optimizer.step()
    assert qat.noise.without_noise == 0
    expected = qat(images(8)).detach()
    output = qat.eval()(images(8))
    assert torch.equal(output, expected)
    npu.close()
    backend.close()
    return net.state_dict(), output


@pytest.mark.parametrize("profile", ["tflm", "onnxruntime", "pow2-trunc", "acc16"])
def test_reference_and_emulator_train_to_equal_bits(profile: str) -> None:
    """Twenty steps with the same seed: every weight and the output on the NPU are bit-equal."""
    options = BackendOptions(profile=profile)
    reference, reference_output = _trained(ReferenceBackend(options), 20)
    emulator, emulator_output = _trained(EmulatorBackend(options), 20)
    for name, weight in reference.items():
        assert torch.equal(weight, emulator[name]), name
    assert torch.equal(reference_output, emulator_output)

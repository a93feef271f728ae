"""No error of PyTorch or ONNX reaches the user as it is, and what people do to modules is borne."""

import re

import pytest
import torch
from difficult_models import BORNE, REFUSED, image
from in_process_npu import InProcessNpu

from npu_server.backends.emulator import EmulatorBackend
from npu_server.seam import BackendOptions
from trainer_client.qat.capture import capture
from trainer_client.qat.module import prepare


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_where_and_what_to_do(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the words of the table, none of which is taken from the code that writes them, and nowhere else."""
    row = REFUSED[name]
    model, example = row.make()
    with pytest.raises(row.error) as refusal:
        capture(model, example)
    assert capsys.readouterr() == ("", "")
    message = str(refusal.value)
    assert len(message) < 900
    for words in row.words:
        assert re.search(words, message), f"{words!r} is missing in: {message}"


@pytest.mark.slow
@pytest.mark.parametrize("name", BORNE)
def test_what_people_do_to_modules_is_borne(name: str) -> None:
    """Calibrated on an emulated chip: training forward equals evaluation, gradients reach every parameter."""
    model, x = BORNE[name](), image(6)
    npu = InProcessNpu(EmulatorBackend(BackendOptions(profile="tflm")))
    qat = prepare(model, x, npu).calibrate(x)
    out = qat(x)
    out.square().sum().backward()
    assert torch.equal(qat.eval()(x), out.detach())
    assert out.detach().unique().numel() > 3
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path

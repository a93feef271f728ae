"""What is saved of a model in the loop, and loaded again."""

import copy
import io
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from in_process_npu import InProcessNpu
from in_the_loop import new_npu, prepared, train
from safetensors.torch import load_file, save_file
from small_nets import ResidualNet, images, residual_net
from torch import nn

from npu_wire.errors import InvalidInput
from trainer_client.qat.module import prepare


def test_resume_is_exact() -> None:
    """Six steps equal three steps, a checkpoint loaded into new objects (weights only), and three more."""
    net = residual_net()
    qat = prepared(new_npu(), net)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    first = train(qat, optimizer, range(3))
    checkpoint = io.BytesIO()
    torch.save({"qat": qat.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    expected = first + train(qat, optimizer, range(3, 6))

    other_net = residual_net(seed=9)
    other = prepare(other_net, images(2), new_npu())
    other_optimizer = torch.optim.Adam(other_net.parameters(), 1e-2)
    state = torch.load(io.BytesIO(checkpoint.getvalue()), weights_only=True)
    other.load_state_dict(state["qat"])
    other_optimizer.load_state_dict(state["optimizer"])
    assert expected == first + train(other, other_optimizer, range(3, 6))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other_net.state_dict()[name]), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_is_tensors_only(tmp_path: Path, prefix: str) -> None:
    """A safetensors file holds it, under a wrapper's prefix (DDP) too: the resumed losses are equal."""
    net = residual_net()
    qat = prepared(new_npu(), net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    train(qat, optimizer, range(2))
    wrap = (lambda m: m) if prefix == "" else (lambda m: nn.ModuleDict({"module": m}))
    save_file(wrap(qat).state_dict(), tmp_path / "model.safetensors")
    expected, ranges = train(qat, optimizer, range(2, 4)), qat.ranges

    other_net = residual_net(seed=9)
    other = prepare(other_net, images(2), new_npu())
    wrap(other).load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert other.ranges == ranges
    assert train(other, torch.optim.SGD(other_net.parameters(), 0.1), range(2, 4)) == expected


def test_a_checkpoint_of_another_npu_is_loaded_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both profiles are named; with the same NPU nothing is said."""
    npu = new_npu()
    state = prepared(npu).state_dict()
    other = prepare(residual_net(seed=9), images(2), npu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(state)
    own = npu.info
    acc16 = replace(own.fingerprint, profile="acc16", profile_hash="5" * 64)
    monkeypatch.setattr(InProcessNpu, "info", property(lambda _: replace(own, fingerprint=acc16)))
    with pytest.warns(UserWarning, match=r"profile 'float' \(hash .* connected to 'acc16' \(hash 555"):
        other.load_state_dict(state)


def test_a_state_dict_without_ranges_is_no_checkpoint() -> None:
    """As for any module: keys that are missing or unknown are named, a broken range is refused."""
    qat = prepared(new_npu())
    state = qat.state_dict()
    weights = {name: value for name, value in state.items() if name.startswith("model.")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"npu\.\*"'):
        qat.load_state_dict(weights)
    before = qat.ranges
    qat.load_state_dict(weights, strict=False)
    assert qat.ranges == before
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"other"'):
        qat.load_state_dict(state | {"other": torch.zeros(1)})
    with pytest.raises(InvalidInput, match=r"'npu.range.hardtanh' is .*min < max"):
        qat.load_state_dict(state | {"npu.range.hardtanh": torch.tensor([1.0, 1.0])})


def test_users_state_dict_keeps_its_names() -> None:
    """`model.state_dict()` is untouched by preparation, and loads into a model that was never prepared."""
    net = residual_net()
    names = list(net.state_dict())
    qat = prepared(new_npu(), net)
    assert list(net.state_dict()) == names
    ResidualNet().load_state_dict(qat.model.state_dict())


def test_copies_are_refused() -> None:
    """A session cannot be copied; the error says what to do."""
    qat = prepared(new_npu())
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled; save"):
            attempt(qat)

"""The promises of the product, through real server processes and real sockets, on real images."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trainer_client
from npu_wire.errors import InvalidInput, NonFiniteInput, ServerUnavailable
from npu_wire.quantize import dequantize
from trainer_client.commands.data import load_dataset
from trainer_client.commands.nets import build_model
from trainer_client.commands.trainer import batch
from trainer_client.npu.connection import Connection
from trainer_client.qat.module import QatModule
from trainer_client.qat.taps import TapContext
from trainer_client.qat.trace import Trace, overlap
from trainer_client.qat.training_pass import TrainingPass

SERVER = [sys.executable, "-m", "npu_server", "serve", "--http", "off", "--profile", "acc16"]
STEPS = 20

OnStep = Callable[[int], None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The machine's other core is the server's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def embedded() -> Iterator[Connection]:
    """An embedded emulator in a process of its own."""
    with trainer_client.connect(profile="acc16") as npu:
        yield npu


def start_server(address: str, backend: str = "emulator") -> "subprocess.Popen[str]":
    """A server that answers at `address`."""
    child = subprocess.Popen(
        [*SERVER, "--backend", backend, "--listen", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    assert "listening on" in child.stdout.readline()
    return child


def kill(child: "subprocess.Popen[str]") -> None:
    """Kill -9."""
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def prepared(npu: Connection) -> QatModule:
    """A network on digits, calibrated, with the same weights each time."""
    torch.manual_seed(0)
    data = load_dataset("digits")
    model = build_model("mobilenet-v1-small", data.classes, data.channels)
    return trainer_client.prepare(model, data.train_x[:2], npu).calibrate(data.train_x[:128])


def trained(qat: QatModule, steps: int = STEPS, on_step: OnStep | None = None) -> dict[str, Tensor]:
    """The user's own weights after some steps of Adam."""
    data = load_dataset("digits")
    optimizer = torch.optim.Adam(qat.model.parameters(), 1e-3)
    qat.train()
    for step in range(steps):
        if on_step:
            on_step(step)
        x, y = batch(data, 32, 0, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(qat(x), y).backward()
        optimizer.step()
    return {name: value.clone() for name, value in qat.model.state_dict().items()}


def assert_equal_weights(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert list(expected) == list(actual)
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_reference_and_emulator_train_to_equal_bits(embedded: Connection) -> None:
    """Twenty steps through two server processes with different backends: every weight is bit-equal."""
    with trainer_client.connect(profile="acc16", backend="reference") as reference:
        assert (reference.info.fingerprint.backend, embedded.info.fingerprint.backend) == (
            "reference",
            "emulator",
        )
        assert reference.info.profile_hash == embedded.info.profile_hash
        assert_equal_weights(trained(prepared(reference)), trained(prepared(embedded)))


def test_every_injected_value_is_the_npus(embedded: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some steps, each injected tensor equals a second, independent session's for batch and weights."""
    qat = prepared(embedded)
    trained(qat, 3)
    values: dict[int, Tensor] = {}

    def recorded(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inject(context: TapContext, value: Tensor, layer: int, *rest: object) -> Tensor:
            values[layer] = forward(context, value, layer, *rest)
            return values[layer]

        return inject

    monkeypatch.setattr(TrainingPass, "inject", recorded(TrainingPass.inject))
    x, _ = batch(load_dataset("digits"), 32, 0, 3)
    qat(x)
    layers = qat.layer_map.layers
    computing = {i for i, layer in enumerate(layers) if not layer.moves_data_only}
    assert set(values) == computing

    with trainer_client.connect(profile="acc16", backend="reference") as second:
        # A fresh capture of the trained model: its weights come with the ONNX file, not as an update.
        fresh = trainer_client.prepare(qat.model, x, second, ranges=qat.ranges)
        session = second.compile(fresh._captured.onnx, qat.ranges)
        entry = session.layer_map.inputs[0]
        codes = np.clip(np.rint(x.numpy() / np.float32(entry.scale)) + entry.zero_point, -128, 127)
        answer = session.submit({entry.name: codes.astype(np.int8)}, sorted(computing))
        for layer, value in values.items():
            spec = session.layer_map.layers[layer].output
            expected = dequantize(answer.tensor(layer), spec.scale, spec.zero_point)
            np.testing.assert_array_equal(expected.reshape(value.shape), value.detach().numpy())


def test_refused_weights_cost_their_step_only(embedded: Connection) -> None:
    """Weights that cannot be folded or scaled raise in that step; restored, the run ends in equal bits."""
    refused = {  # by step: a batch norm's values, and what the NPU has against them
        2: ({"weight": 3e38, "running_var": 0.0}, NonFiniteInput),
        4: ({"weight": 1e30}, InvalidInput),
    }
    undisturbed = trained(prepared(embedded), 6)
    qat = prepared(embedded)
    norm = next(module for module in qat.model.modules() if isinstance(module, nn.BatchNorm2d))
    images = batch(load_dataset("digits"), 32, 0, 0)[0]

    def poison(step: int) -> None:
        if step not in refused:
            return
        values, kind = refused[step]
        good = {name: value.clone() for name, value in norm.state_dict().items()}
        with torch.no_grad():
            for name, value in values.items():
                getattr(norm, name).fill_(value)
        for _ in range(2):
            with pytest.raises(kind, match=r"is not loaded: .*repair"):
                qat(images)
        norm.load_state_dict(good)

    assert_equal_weights(undisturbed, trained(qat, 6, poison))


def test_a_killed_server_costs_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kill -9 and restart in the middle of training: the loss is reported and the weights end the same."""
    address = f"unix:{tmp_path}/npu.sock"
    children = [start_server(address)]

    def strike(step: int) -> None:
        if step in (7, 13):
            kill(children.pop())
            children.append(start_server(address))

    try:
        with trainer_client.connect(address) as npu:
            undisturbed = trained(prepared(npu))
        with trainer_client.connect(address) as npu, caplog.at_level(logging.WARNING):
            assert_equal_weights(undisturbed, trained(prepared(npu), on_step=strike))
        assert caplog.text.count("trying for 60 s") == 2
    finally:
        kill(children.pop())


def test_training_goes_on_with_another_backend_of_the_same_arithmetic(tmp_path: Path) -> None:
    """The emulator is killed and the reference takes its address: other memory order, equal weights."""
    address = f"unix:{tmp_path}/npu.sock"
    children = [start_server(address)]

    def strike(step: int) -> None:
        if step == 3:
            kill(children.pop())
            children.append(start_server(address, "reference"))

    try:
        with trainer_client.connect(address) as npu:
            undisturbed = trained(prepared(npu), 6)
        with trainer_client.connect(address) as npu:
            assert_equal_weights(undisturbed, trained(prepared(npu), 6, strike))
    finally:
        kill(children.pop())


def test_a_server_that_stays_away_is_reported_and_the_step_can_be_repeated(tmp_path: Path) -> None:
    """The deadline passes, the error says what to do, and the same step then goes on with nothing lost."""
    address = f"unix:{tmp_path}/npu.sock"
    child = start_server(address)
    try:
        with trainer_client.connect(address, reconnect_timeout_s=1.0) as npu:
            qat = prepared(npu).train()
            x, _ = batch(load_dataset("digits"), 32, 0, 0)
            expected = qat(x).detach()
            kill(child)
            with pytest.raises(ServerUnavailable, match="start it again and repeat the step"):
                qat(x)
            child = start_server(address)
            assert torch.equal(qat(x), expected)
    finally:
        kill(child)


def test_fp32_layers_run_while_the_npu_works_on_later_ones(tmp_path: Path, embedded: Connection) -> None:
    """The trace of a few batches has FP32 layers beside the NPU's work on later layers of the same batch."""
    path = tmp_path / "trace.json"
    # Large enough for work of a tenth of a second: on a busy machine both processes must get their turns.
    images = nn.functional.interpolate(load_dataset("digits").train_x[:256], scale_factor=4)
    with Trace(path) as trace:
        model = build_model("mobilenet-v1-small", 10, 1)
        qat = trainer_client.prepare(model, images[:2], embedded, trace=trace).calibrate(images).train()
        for _ in range(3):
            qat(images)
    document = json.loads(path.read_text())
    seen = overlap(document)
    assert seen.fp32_layers == 3 * sum(not layer.moves_data_only for layer in qat.layer_map.layers)
    assert seen.fp32_layers_beside_npu > 0


@pytest.mark.slow
def test_an_endpoint_gives_the_table_of_the_embedded_run(tmp_path: Path) -> None:
    """`compare` against a server started by hand and against its own: equal accuracies, cell by cell."""
    trainer = Path(sys.executable).with_name("npu-trainer")
    common = ["compare", "--fp32-steps", "60", "--qat-steps", "5", "--seeds", "2"]
    address = f"unix:{tmp_path}/npu.sock"
    child = start_server(address)
    tables = []
    try:
        for out, where in (("embedded", ["--profile", "acc16"]), ("remote", ["--endpoint", address])):
            command = [str(trainer), *common, *where, "--out", str(tmp_path / out)]
            subprocess.run(command, check=True, capture_output=True, timeout=200)
            cells = json.loads((tmp_path / out / "results.json").read_text())["cells"]
            tables.append({(c["seed"], c["method"], c["profile"]): c["accuracy"] for c in cells})
    finally:
        kill(child)
    assert len(tables[0]) == 8
    assert tables[0] == tables[1]

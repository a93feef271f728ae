"""Where floating-point kernels could leave the integers, and what a yielded tensor promises."""

import numpy as np
import pytest
import torch
from onnx import helper
from single_layers import BACKENDS, Scale, random_codes, single_layer

from npu_server.backends.emulator import EmulatorBackend, kernels
from npu_server.backends.emulator.packing import pack_pairs
from npu_server.backends.emulator.sums import CPU_METHODS, Task, exact_sums
from npu_server.backends.reference import ReferenceBackend
from npu_server.compile.graph import Window
from npu_server.seam import Backend, BackendOptions
from npu_wire.errors import InvalidInput, InvalidProfile
from npu_wire.layer_map import MemoryLayout


@pytest.mark.parametrize(
    ("channels", "method", "parts"),
    [(128, "int8 convolution", 3), (200, "int8 convolution", 4), (512, "int8 matrix product", 1)],
)
def test_sums_beyond_float32_stay_exact(channels: int, method: str, parts: int) -> None:
    """Weights 127, inputs 255, sums of 37, 58 and 149 million: three and four slices, or int32.

    A bias cancels most of the sum, so that its low bits show.
    """
    rng = np.random.default_rng(0)
    codes = np.full((4, channels, 3, 3), 127.0)
    codes[:, :, 1, 1] -= rng.integers(0, 2, (4, channels))
    batch = np.where(rng.random((2, channels, 3, 3)) < 0.999, 127, 126).astype(np.int8)
    sums = np.einsum("nchw,ochw->no", batch.astype(np.int64) + 128, codes.astype(np.int64))
    net = single_layer(
        "onnxruntime",
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv")],
        (channels, 3, 3),
        {"x": Scale(1.0, -128), "y": Scale(64.0, 0)},
        {"w": codes.astype(np.float32), "b": np.full(4, -np.rint(sums.mean()), np.float32)},
    )
    weights = net.prepared.weights
    assert weights.scales.tolist() == [1.0] * 4
    chosen = exact_sums(Task(weights.codes, -128, Window((3, 3))), torch.device("cpu"), CPU_METHODS)
    assert (chosen.method, len(chosen.parts)) == (method, parts)
    expected = np.clip(np.rint((sums + weights.bias) / 64), -128, 127).reshape(2, 4, 1, 1)
    for backend in BACKENDS:
        np.testing.assert_array_equal(net.run(backend, batch)["y"], expected)


def test_slices_hold_by_hand() -> None:
    """Weights 127 in 1,024 channels, inputs up to 255: 33,162,240 takes two slices of 16,581,120."""
    codes, floats = np.full((1, 1024, 1, 1), 127, np.int8), CPU_METHODS[2:]
    sums = exact_sums(Task(codes, -128, Window((1, 1))), torch.device("cpu"), floats)
    assert [part.channels for part in sums.parts] == [slice(0, 512), slice(512, 1024)]
    # Half of them negative: each sign's sum alone stays below 2^24.
    codes[:, ::2] = -127
    sums = exact_sums(Task(codes, -128, Window((1, 1))), torch.device("cpu"), floats)
    assert [part.channels for part in sums.parts] == [slice(0, 1024)]
    # In groups there is nothing to slice, so float64 takes it.
    grouped = Task(np.full((2, 1024, 1, 1), 127, np.int8), -128, Window((1, 1)), groups=2)
    assert exact_sums(grouped, torch.device("cpu"), floats).method == "float64"


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_channel_in_a_batch(backend: type[Backend]) -> None:
    """One channel, batch 2, unequal strides, which torch 2.13 gets wrong on a transposed view."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (1, 1, 3, 3)).astype(np.float32)
    codes[0, 0, 0, 0] = 127
    net = single_layer(
        "onnxruntime",
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv", strides=[1, 2], pads=[0, 0, 0, 1])],
        (1, 4, 3),
        {"x": Scale(1.0, -128), "y": Scale(1024.0, 0)},
        {"w": codes},
    )
    batch = random_codes(rng, 2, 1, 4, 3)
    padded = np.pad(batch.astype(np.int64) + 128, ((0, 0), (0, 0), (0, 0), (0, 1)))[:, 0]
    expected = [
        [[(padded[n, i : i + 3, j : j + 3] * codes[0, 0]).sum() / 1024 for j in [0]] for i in (0, 1)]
        for n in (0, 1)
    ]
    np.testing.assert_array_equal(net.run(backend, batch)["y"][:, 0], np.clip(np.rint(expected), -128, 127))


@pytest.mark.parametrize("backend", BACKENDS)
def test_yielded_tensors_stay_as_they_are(backend: type[Backend]) -> None:
    """Nothing writes to a yielded tensor while later layers run; its bytes lie as the layer map says."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["a"], ["b"], "pool", kernel_shape=[1, 1]),
        helper.make_node("Add", ["a", "b"], ["c"], "add"),
        helper.make_node("Flatten", ["c"], ["y"], "flatten"),
    ]
    rng = np.random.default_rng(1)
    weight = rng.normal(0, 0.2, (3, 3, 3, 3)).astype(np.float32)
    net = single_layer(
        "tflm", nodes, (3, 5, 4), {n: Scale(0.02, 0) for n in ("x", "a", "c", "y")}, {"w": weight}
    )
    program = backend(BackendOptions(profile="tflm")).compile(net.model, net.ranges)
    layers = program.layer_map.layers
    held = [
        (t.layer, t.data, t.data.copy())
        for t in program.forward({"x": random_codes(rng, 2, 3, 5, 4)}, range(len(layers)))
    ]
    for i, (layer, data, copy) in enumerate(held):
        np.testing.assert_array_equal(data, copy)
        assert not any(np.shares_memory(data, other) for _, other, _ in held[:i])
        last = layers[layer].output.layout is MemoryLayout.CHANNELS_LAST
        assert (data.transpose(0, 2, 3, 1) if last else data).flags.c_contiguous


@pytest.mark.parametrize(
    ("backend", "options", "error"),
    [
        (EmulatorBackend, BackendOptions(profile="tflm", device="npu9000"), InvalidInput),
        (EmulatorBackend, BackendOptions(profile="tflm", device="meta"), InvalidInput),
        (EmulatorBackend, BackendOptions(profile="tflm", extra={"speed": "warp"}), InvalidInput),
        (EmulatorBackend, BackendOptions(), InvalidProfile),
        (ReferenceBackend, BackendOptions(profile="tflm", device="cuda"), InvalidInput),
        (ReferenceBackend, BackendOptions(profile="tflm", extra={"speed": "warp"}), InvalidInput),
    ],
)
def test_options_are_checked(backend: type[Backend], options: BackendOptions, error: type[Exception]) -> None:
    """What a backend cannot honour it refuses at construction."""
    with pytest.raises(error):
        backend(options)


def test_a_chain_of_sums_holds_a_bounded_number_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model of many sums would otherwise unfold into gigabytes; updates leave the choice as it is."""
    monkeypatch.setattr(kernels, "_MOST_TABLES", 2)
    tabled: list[str] = []

    def counted(layer, *rest):
        tabled.append(layer.spec.name)
        return pack_pairs(layer, *rest)

    monkeypatch.setattr(kernels, "pack_pairs", counted)
    names = ["x", "a", "b", "y"]
    nodes = [helper.make_node("Add", [names[i], "w"], [names[i + 1]], f"add_{i}") for i in range(3)]
    weights = {"w": np.linspace(-1, 1, 512).astype(np.float32).reshape(1, 8, 8, 8)}
    net = single_layer("tflm", nodes, (8, 8, 8), {name: Scale(0.02, 0) for name in names}, weights)
    batch = random_codes(np.random.default_rng(2), 2, 8, 8, 8)
    programs = [backend(BackendOptions("tflm")).compile(net.model, net.ranges) for backend in BACKENDS[:2]]
    for update in ({}, {"w": -weights["w"]}):
        for program in programs:
            program.load_weights(update)
        for expected, actual in zip(
            *(program.forward(program.layer_map.named(batch), range(3)) for program in programs), strict=True
        ):
            np.testing.assert_array_equal(actual.data, expected.data)
    assert tabled == ["a", "b", "a", "b"]


def test_both_backends_carry_the_same_hash() -> None:
    """Equal profile, equal hash: the promise of equal bits."""
    hashes = [b(BackendOptions(profile="acc16")).open().fingerprint.profile_hash for b in BACKENDS]
    assert len(set(hashes)) == 1

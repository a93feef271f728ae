"""Speed of the emulator's forward beside FP32 and beside an INT8 runtime that is not asked to be exact.

    python benchmarks/emulator.py [--size 96 224] [--batch 32] [--rounds 15] [--threads 1] [--write]

MobileNetV2 and ResNet18 (Hugging Face's class). In every round each contestant takes one forward in turn, so
a machine that slows down slows all of them; medians and their ratios are printed. FP32 runs channels last,
its batch norms folded into the convolutions (the fastest that eager torch does) and not. ONNX Runtime runs
the same network as QLinear operators with u8 activations, quantized by its own tool and laid out by its own
optimizer (channels last), once yielding its last tensor only and once every layer's. The emulator yields
every layer's.
`--layers` prints where the emulator's time goes instead. Set MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_=8589934592 so that the C library keeps memory; all contestants gain from it.
"""

import argparse
import copy
import itertools
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from keeping import keep
from mobilenet import MobileNetV2
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import ResNetConfig, ResNetForImageClassification

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.emulator.native import levels
from npu_server.seam import BackendOptions, Program
from npu_wire.layer_map import Int8Array
from npu_wire.quantize import quantize
from trainer_client.qat.calibrate import observe
from trainer_client.qat.capture import Captured, capture


class ResNet18(nn.Module):
    """He et al., 2016; logits only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ResNetForImageClassification(
            ResNetConfig(
                depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", num_labels=1000
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, 1000)."""
        return self.body(x).logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MobileNetV2": MobileNetV2, "ResNet18": ResNet18}


def trained_statistics(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Gives the batch norms the statistics of `x`, so that codes use their range as in a trained network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def folded(model: nn.Module) -> nn.Module:
    """A copy whose batch norms are part of the convolutions before them."""
    copied = copy.deepcopy(model)
    for parent in list(copied.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return copied.to(memory_format=torch.channels_last)


class OneBatch(CalibrationDataReader):
    """What ONNX Runtime's tool calibrates with."""

    def __init__(self, x: torch.Tensor) -> None:
        self._batches = iter([{"x": x.numpy()}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The batch, then None."""
        return next(self._batches, None)


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Quiet, with so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options


def qlinear_sessions(
    model: nn.Module, x: torch.Tensor, threads: int
) -> dict[str, onnxruntime.InferenceSession]:
    """The network as ONNX Runtime's own tool quantizes it: u8 activations, s8 weights per channel.

    What its optimizer makes of the model is loaded a second time with every operator's tensor as an output:
    asked for before, the outputs would keep it from fusing and from laying out channels last.
    """
    options = session_options(threads)
    with tempfile.TemporaryDirectory() as folder:
        plain, quantized, optimized = (
            Path(folder, f"{name}.onnx") for name in ("plain", "quantized", "fast")
        )
        torch.onnx.export(model, (x,), plain, dynamo=True, verbose=False)
        quantize_static(
            plain,
            quantized,
            OneBatch(x),
            QuantFormat.QOperator,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        options.optimized_model_filepath = str(optimized)
        last_only = onnxruntime.InferenceSession(quantized, options)
        fast = onnx.load(optimized)
    named = {output.name for output in fast.graph.output}
    for node in fast.graph.node:
        if node.op_type.startswith(("QLinear", "QGemm", "MaxPool")) and node.output[0] not in named:
            fast.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    options = session_options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    every = onnxruntime.InferenceSession(fast.SerializeToString(), options)
    return {"every layer": every, "last only": last_only}


def compiled(
    captured: Captured, x: torch.Tensor, profile: str, threads: int, on_torch: bool = False
) -> tuple[Program, Int8Array]:
    """The program on the emulator, by native kernels or by torch's, and its input."""
    backend = EmulatorBackend(
        BackendOptions(profile=profile, threads=threads), levels=() if on_torch else None
    )
    backend.open()
    program = backend.compile(captured.onnx, observe(captured, x))
    entry = program.layer_map.inputs[0]
    return program, quantize(x.numpy(), entry.scale, entry.zero_point)


def seconds(contestant: Callable[[], object]) -> float:
    """Duration of one call."""
    start = time.perf_counter()
    contestant()
    return time.perf_counter() - start


def medians(contestants: dict[str, Callable[[], object]], rounds: int) -> Iterator[tuple[str, float]]:
    """Median milliseconds of each; the first two rounds compile kernels and warm caches."""
    taken: dict[str, list[float]] = defaultdict(list)
    for round_ in range(rounds + 2):
        for name, contestant in contestants.items():
            elapsed = seconds(contestant)
            if round_ >= 2:
                taken[name].append(elapsed)
    for name, values in taken.items():
        yield name, statistics.median(values) * 1e3


def forward_of(program: Program, codes: Int8Array) -> Callable[[], object]:
    """One forward that yields every layer's tensor."""
    taps = range(len(program.layer_map.layers))
    return lambda: [None for _ in program.forward(program.layer_map.named(codes), taps)]


def print_layers(program: Program, codes: Int8Array, rounds: int) -> None:
    """Median milliseconds of each layer, and their sum by operator."""
    taken: dict[int, list[float]] = defaultdict(list)
    layers = program.layer_map.layers
    for _ in range(rounds):
        for tensor in filter(None, program.forward(program.layer_map.named(codes), range(len(layers)))):
            taken[tensor.layer].append((tensor.end_ns - tensor.start_ns) / 1e6)
    totals: dict[str, float] = defaultdict(float)
    for index, values in taken.items():
        spec, median = layers[index], statistics.median(values)
        totals[spec.op] += median
        print(f"  {median:7.2f} ms  {spec.op:12s} {'x'.join(map(str, spec.output.shape)):14s} {spec.name}")
    print("  by operator: " + ", ".join(f"{op} {total:.1f} ms" for op, total in totals.items()))


def rows_of(network: str, size: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Measures all contestants on one network and prints a line each."""
    x = torch.randn(arguments.batch, 3, size, size)
    images = x.to(memory_format=torch.channels_last)
    model = trained_statistics(NETWORKS[network](), x)
    captured, threads = capture(model, x), arguments.threads
    programs = {f"emulator {p}": compiled(captured, x, p, threads) for p in arguments.profiles}
    first = arguments.profiles[0]
    programs[f"emulator {first}, torch's kernels"] = compiled(captured, x, first, threads, on_torch=True)
    print(f"{network}@{size}, batch {arguments.batch}, threads {threads}")
    if arguments.layers:
        for name, (program, codes) in programs.items():
            print(f" {name}")
            print_layers(program, codes, arguments.rounds)
        return []
    plain, fast = model.to(memory_format=torch.channels_last), folded(model)
    contestants: dict[str, Callable[[], object]] = {
        "torch FP32, batch norm folded": lambda: fast(images),
        "torch FP32": lambda: plain(images),
    }
    feed = {"x": x.numpy()}
    for which, session in qlinear_sessions(fast, x, threads).items():
        contestants[f"ONNX Runtime QLinear u8, {which}"] = lambda session=session: session.run(None, feed)
    for name, (program, codes) in programs.items():
        contestants[name] = forward_of(program, codes)
    weights = {name: captured.tensor(name).detach().numpy() for name in captured.initializers}
    program = programs[f"emulator {first}"][0]
    used = {name for layer in program.layer_map.layers for name in layer.parameters}
    fresh = {name: array for name, array in weights.items() if name in used}
    contestants[f"all weights anew, {first}"] = lambda: program.load_weights(fresh)
    with torch.inference_mode():
        taken = dict(medians(contestants, arguments.rounds))
    fp32, ort = taken["torch FP32, batch norm folded"], taken["ONNX Runtime QLinear u8, every layer"]
    print(f"  {'':38s} {'ms':>8s} {'/ FP32':>7s} {'/ ORT':>7s}")
    for name, ms in taken.items():
        print(f"  {name:38s} {ms:8.1f} {ms / fp32:7.2f} {ms / ort:7.2f}")
    return [
        {
            "network": network,
            "size": size,
            "contestant": name,
            "ms": round(ms, 2),
            "of_fp32": round(ms / fp32, 3),
        }
        | {"of_onnxruntime": round(ms / ort, 3)}
        for name, ms in taken.items()
    ]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[96])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--profiles", nargs="+", default=["tflm", "onnxruntime", "pow2-trunc"])
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    rows = [
        row
        for size, network in itertools.product(arguments.size, arguments.networks)
        for row in rows_of(network, size, arguments)
    ]
    if arguments.write:
        keep(
            "emulator",
            batch=arguments.batch,
            threads=arguments.threads,
            kernels=", ".join(level.name for level in levels()) or "torch",
            torch=torch.__version__,
            onnxruntime=onnxruntime.__version__,
            rows=rows,
        )


if __name__ == "__main__":
    main()

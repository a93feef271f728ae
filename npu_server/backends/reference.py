"""The reference backend: the arithmetic of a profile, written to be read. It is the specification."""

import functools
from collections.abc import Iterable, Iterator

import numpy as np

from npu_server.compile.graph import (
    Add,
    AveragePool,
    Clamp,
    Concat,
    Conv,
    Extreme,
    Gemm,
    HostFloat,
    HostPart,
    Interpolate,
    Largest,
    Lut,
    MatMul,
    MaxPool,
    Mean,
    Mul,
    Pad,
    PRelu,
    Rearrange,
    Reshape,
    Select,
    Smallest,
    Sub,
    Sum,
)
from npu_server.compile.planning.lowering import Layer
from npu_server.compile.planning.weights import Prepared
from npu_server.compile.reading.operators import operators_of
from npu_server.execution import moving
from npu_server.execution.host import compute_on_host
from npu_server.execution.host_part import run_part
from npu_server.execution.pairs import combine, in_order, multiply_and_saturate, quantizations
from npu_server.execution.program import compile_program
from npu_server.execution.sliding import average_windows, positions
from npu_server.numerics import elementwise
from npu_server.numerics.profile import Profile, load_profile
from npu_server.numerics.requantize import accumulate, requantize, saturating_sum
from npu_server.numerics.scales import Int64Array
from npu_server.seam import BackendOptions, Health, Program, Ranges
from npu_wire.device import Capabilities, Fingerprint
from npu_wire.errors import InvalidInput
from npu_wire.layer_map import INT8_MIN, Int8Array, MemoryLayout

MAX_BATCH = 256


class ReferenceBackend:
    """An NPU in NumPy int64."""

    def __init__(self, options: BackendOptions) -> None:
        """Loads the profile.

        Args:
            options: profile, and nothing else: it computes on the CPU.

        Raises:
            InvalidInput: an unknown profile, device or option.
        """
        if options.device != "cpu":
            raise InvalidInput(
                f"backend reference computes on the CPU, not on {options.device!r}; use --backend emulator"
            )
        if options.extra:
            raise InvalidInput(f"backend reference has no options; leave out {', '.join(options.extra)}")
        self._profile = load_profile(options.profile)

    def open(self) -> Capabilities:
        """Nothing to take hold of."""
        profile = self._profile
        fingerprint = Fingerprint(
            "reference", "npu-in-the-loop", profile.name, "1", profile.name, profile.hash
        )
        return Capabilities(fingerprint, operators_of(profile), MAX_BATCH)

    def close(self) -> None:
        """Nothing to let go of."""

    def probe(self) -> Health:
        """Always well."""
        return Health(True)

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        """Compiles a float ONNX model; see `npu_server.seam.Backend.compile`."""
        return compile_program(model, ranges, self._profile, ReferenceKernels(self._profile), MAX_BATCH)


class ReferenceKernels:
    """One method a layer; tensors are int8 (N, C, H, W) or (N, ...), sums are int64."""

    image_layout = MemoryLayout.CONTIGUOUS
    work_at_once = 50_000_000

    def __init__(self, profile: Profile) -> None:
        """Takes the arithmetic.

        Args:
            profile: the arithmetic.
        """
        self._profile = profile
        self._every_mac = profile.accumulator.where == "every_mac"

    def pack(self, layer: Layer, prepared: Prepared) -> Prepared:
        """Nothing to pack."""
        return prepared

    def load(self, batch: Int8Array) -> Int8Array:
        """Nothing to convert."""
        return batch

    def join(self, parts: list[Int8Array]) -> Int8Array:
        """One after the other."""
        return np.concatenate(parts)

    def export(self, layer: Layer, tensor: Int8Array) -> Int8Array:
        """The tensor itself."""
        return tensor

    def execute(self, layer: Layer, packed: Prepared, inputs: list[Int8Array]) -> Int8Array:
        """Computes one layer."""
        return np.ascontiguousarray(self._execute(layer, packed, inputs)).reshape(-1, *layer.shape)

    def _execute(self, layer: Layer, prepared: Prepared, inputs: list[Int8Array]) -> Int8Array:
        operator, x, out, profile = layer.operator, inputs[0], layer.output, self._profile
        match operator:
            case Conv():
                image = _image(x)
                if operator.stuffing is not None:
                    image = moving.stuff(image, operator.stuffing, layer.sources[0].zero_point)
                products = _convolution_products(_centred(layer, image), prepared, operator, self._every_mac)
                return self._finish(products, layer, prepared, axis=1)
            case Gemm():
                rows = np.moveaxis(_centred(layer, x), operator.axis, -1)
                products = _matrix_products(rows, prepared, self._every_mac)
                return np.moveaxis(
                    self._finish(products, layer, prepared, axis=x.ndim - 1), -1, operator.axis
                )
            case MatMul():
                assert prepared.multiplier is not None
                constant = None if prepared.operand is None else prepared.operand.codes
                factors = in_order(operator, inputs, constant)
                rows, columns = (
                    codes.astype(np.int64) - source.zero_point
                    for codes, source in zip(factors, quantizations(layer, operator, prepared), strict=True)
                )
                rule = profile.accumulator
                if self._every_mac:
                    held = multiply_and_saturate(rows, columns, rule)
                else:
                    held = accumulate(rows @ columns, rule)
                return requantize(held, prepared.multiplier, out)
            case Add() | Sub() | Mul():
                constant = None if prepared.operand is None else prepared.operand.codes
                a, b = in_order(operator, inputs, constant)
                return combine(layer, operator, prepared, a, b, profile)
            case Lut() | Clamp():
                return prepared.tables[0][x.astype(np.int64) + 128]
            case PRelu():
                slopes = np.arange(len(prepared.tables[0])).reshape(operator.slope.shape)
                return prepared.tables[0][slopes, x.astype(np.int64) + 128]
            case Concat():
                parts = [t[v.astype(np.int64) + 128] for t, v in zip(prepared.tables, inputs, strict=True)]
                for (position, _), codes in zip(operator.constants, prepared.joined, strict=True):
                    parts.insert(position, np.broadcast_to(codes, (len(x), *codes.shape[1:])))
                joined: Int8Array = np.concatenate(parts, axis=operator.axis)
                return joined
            case Extreme():
                parts = [t[v.astype(np.int64) + 128] for t, v in zip(prepared.tables, inputs, strict=True)]
                choose = np.maximum if operator.largest else np.minimum
                chosen: Int8Array = functools.reduce(choose, [*parts, *prepared.joined])
                return chosen
            case MaxPool():
                windows = list(positions(_image(x), operator.window, INT8_MIN))
                largest: Int8Array = np.stack(windows).max(axis=0)
                return largest
            case AveragePool():
                return average_windows(layer, operator, _image(x), profile)
            case Mean() | Sum():
                total, count = (
                    _centred(layer, x).sum(axis=operator.axes),
                    np.prod(np.take(x.shape, operator.axes)),
                )
                if isinstance(operator, Sum):
                    return elementwise.total(total, int(count), layer.sources[0], layer.scale, out, profile)
                return elementwise.average(total, count, layer.sources[0], layer.scale, out, "mean", profile)
            case Largest():
                highest: Int8Array = x.max(axis=operator.axes)
                return highest
            case Smallest():
                lowest: Int8Array = x.min(axis=operator.axes)
                return lowest
            case Pad():
                return np.pad(x, ((0, 0), *operator.pads), constant_values=out.zero_point)
            case Reshape():
                return x.copy()
            case Rearrange():
                return moving.rearrange(x, operator)
            case Select():
                return moving.select(x, operator)
            case Interpolate():
                return moving.interpolate(_image(x), operator)
            case HostFloat():
                return compute_on_host(layer, operator, prepared, inputs)
            case HostPart():
                return run_part(layer, operator, prepared, inputs)
        raise AssertionError(f"no kernel for {operator}")

    def _finish(
        self, products: Iterable[Int64Array], layer: Layer, prepared: Prepared, axis: int
    ) -> Int8Array:
        """Bias, accumulator, requantization; `axis` holds the output channels."""
        assert prepared.weights is not None
        assert prepared.multiplier is not None
        bias, rule = prepared.weights.bias, self._profile.accumulator
        channels_last = (np.moveaxis(product, axis, -1) for product in products)
        if self._every_mac:
            held = saturating_sum(bias, channels_last, rule)
        else:
            held = accumulate(sum(channels_last, bias), rule)
        return np.moveaxis(requantize(held, prepared.multiplier, layer.output), -1, axis)


def _image(x: Int8Array) -> Int8Array:
    """A sequence (N, C, L) as an image of one row, a vector (N, C) as one pixel."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], 1, -1)


def _centred(layer: Layer, x: Int8Array) -> Int64Array:
    """Codes minus zero point, so that 0 stands for real 0 and padding is 0."""
    return x.astype(np.int64) - layer.sources[0].zero_point


def _convolution_products(
    x: Int64Array, prepared: Prepared, operator: Conv, one_by_one: bool
) -> Iterator[Int64Array]:
    """What is added up, (N, out, height, width) each, window position by window position.

    `one_by_one`: input channel by input channel as well, instead of all of a position together.
    """
    assert prepared.weights is not None
    codes = prepared.weights.codes.astype(np.int64)
    out, per_group, height, width = codes.shape
    grouped = codes.reshape(operator.groups, out // operator.groups, per_group, height * width)
    for k, covered in enumerate(positions(x, operator.window, 0)):
        n, _, rows, columns = covered.shape
        channels = covered.reshape(n, operator.groups, per_group, rows, columns)
        for some in [slice(c, c + 1) for c in range(per_group)] if one_by_one else [slice(None)]:
            yield np.einsum("ngchw,goc->ngohw", channels[:, :, some], grouped[:, :, some, k]).reshape(
                n, out, rows, columns
            )


def _matrix_products(x: Int64Array, prepared: Prepared, one_by_one: bool) -> Iterator[Int64Array]:
    """What is added up, (..., out) each: input by input, or all of them together."""
    assert prepared.weights is not None
    codes = prepared.weights.codes.astype(np.int64).T
    for some in [slice(i, i + 1) for i in range(len(codes))] if one_by_one else [slice(None)]:
        yield x[..., some] @ codes[some]

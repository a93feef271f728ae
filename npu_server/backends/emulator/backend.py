"""The emulator's face to the service."""

import torch

from npu_server.backends.base import BackendOptions, Capabilities, Fingerprint, Health, Program, Ranges
from npu_server.backends.emulator.kernels import EmulatorKernels
from npu_server.backends.emulator.requantize import compile_kernels
from npu_server.backends.emulator.tables import compile_tables
from npu_server.compile.operators import operators_of
from npu_server.compile.program import compile_program
from npu_server.numerics.profile import load_profile
from npu_wire.errors import DeviceFault, InvalidInput

MAX_BATCH = 1024


class EmulatorBackend:
    """An NPU in torch: integer sums on floating-point units, exact by a bound checked layer by layer."""

    def __init__(self, options: BackendOptions) -> None:
        """Loads the profile and checks the device's name.

        Args:
            options: profile, device and threads.

        Raises:
            InvalidInput: an unknown profile, device or option.
        """
        if options.extra:
            raise InvalidInput(f"backend emulator has no options; got {', '.join(options.extra)}")
        try:
            self._device = torch.device(options.device)
        except RuntimeError as error:
            raise InvalidInput(f"device {options.device!r} is none; use cpu, cuda or cuda:N") from error
        if self._device.type not in ("cpu", "cuda"):
            raise InvalidInput(f"device {options.device!r} is not supported; use cpu, cuda or cuda:N")
        self._profile = load_profile(options.profile)
        self._threads = options.threads

    def describe(self) -> Capabilities:
        """What it is and can do."""
        profile = self._profile
        fingerprint = Fingerprint(
            "emulator", "npu-in-the-loop", profile.name, "1", profile.name, profile.hash
        )
        return Capabilities(fingerprint, operators_of(profile), MAX_BATCH, location=str(self._device))

    def open(self) -> None:
        """Takes the device, sets torch's threads, compiles kernels.

        Raises:
            DeviceFault: the GPU is not there, or its arithmetic is not exact.
        """
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceFault("torch finds no CUDA device; use --device cpu")
        if self._threads:
            torch.set_num_threads(self._threads)
        if self._device.type == "cpu":
            compile_kernels()
            compile_tables()
        health = self.probe()
        if not health.ok:
            raise DeviceFault(health.detail)

    def close(self) -> None:
        """Nothing to let go of."""

    def probe(self) -> Health:
        """Sums integer products whose sum float32 still holds; an accumulator of less would show."""
        values = torch.full((4, 64), 255.0, device=self._device)
        weights = torch.full((4, 64), 127.0, device=self._device)
        weights[:, 0] = 126.0
        exact = 255 * 127 * 64 - 255
        image, kernel = values.reshape(4, 64, 1, 1), weights.reshape(4, 64, 1, 1)
        products = torch.nn.functional.linear(values, weights)
        sums = torch.nn.functional.conv2d(image, kernel)
        if bool((products == exact).all()) and bool((sums == exact).all()):
            return Health(True)
        return Health(
            False,
            f"float32 arithmetic of {self._device} is not exact; unset reduced precision (torch.backends)",
        )

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        """Compiles a float ONNX model; see `npu_server.backends.base.Backend.compile`."""
        return compile_program(
            model, ranges, self._profile, EmulatorKernels(self._profile, self._device), MAX_BATCH
        )

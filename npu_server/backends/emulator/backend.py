"""The emulator's face to the service."""

import torch

from npu_server.backends.emulator import native
from npu_server.backends.emulator.kernels import EmulatorKernels
from npu_server.backends.emulator.native import Level
from npu_server.backends.emulator.requantize import compile_kernels
from npu_server.backends.emulator.selftest import Verdict, examine, examine_levels, is_exact
from npu_server.backends.emulator.sums import CPU_METHODS, CUDA_METHODS, Method
from npu_server.backends.emulator.tables import compile_tables
from npu_server.compile.reading.operators import operators_of
from npu_server.execution.program import compile_program
from npu_server.numerics.profile import load_profile
from npu_server.seam import BackendOptions, Health, Program, Ranges
from npu_wire.device import Capabilities, Fingerprint
from npu_wire.errors import DeviceFault, InvalidInput

MAX_BATCH = 1024


class EmulatorBackend:
    """An NPU in torch: integer sums on whatever unit is fastest, exact by a bound proven layer by layer."""

    def __init__(
        self,
        options: BackendOptions,
        methods: tuple[Method, ...] = (),
        levels: tuple[Level, ...] | None = None,
    ) -> None:
        """Loads the profile and checks the device's name.

        Args:
            options: profile, device and threads.
            methods: ways to sum in the order of preference, the last one for everything; empty: the device's.
            levels: native kernels in the order of preference; None: the CPU's, or none beside methods.

        Raises:
            InvalidInput: an unknown profile, device or option.
        """
        if options.extra:
            raise InvalidInput(f"backend emulator has no options; leave out {', '.join(options.extra)}")
        try:
            self._device = torch.device(options.device)
        except RuntimeError as error:
            raise InvalidInput(f"device {options.device!r} is none; use cpu, cuda or cuda:N") from error
        if self._device.type not in ("cpu", "cuda"):
            raise InvalidInput(f"device {options.device!r} is not supported; use cpu, cuda or cuda:N")
        self._methods = methods or (CPU_METHODS if self._device.type == "cpu" else CUDA_METHODS)
        if levels is None:
            levels = () if methods or self._device.type != "cpu" else native.levels()
        self._levels = levels
        self._profile = load_profile(options.profile)
        self._threads = options.threads

    def open(self) -> Capabilities:
        """Takes the device, sets torch's threads, compiles kernels, tests them against the specification.

        Raises:
            DeviceFault: the GPU is not there, or nothing sums exactly on it.
        """
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceFault("torch finds no CUDA device; use --device cpu")
        if self._threads:
            torch.set_num_threads(self._threads)
        if self._device.type == "cpu":
            compile_kernels()
            compile_tables()
        profile, found = self._profile, examine_levels(self._levels)
        return Capabilities(
            Fingerprint("emulator", "npu-in-the-loop", profile.name, "1", profile.name, profile.hash),
            operators_of(profile),
            MAX_BATCH,
            location=str(self._device),
            failed_kernels=(*found.failed, *self._examine().failed),
            kernels=found.trusted[0].name if found.trusted else "torch",
        )

    def close(self) -> None:
        """Nothing to let go of."""

    def probe(self) -> Health:
        """Runs the start-up test on the kernel that everything else falls back to."""
        last = self._methods[-1]
        if is_exact(last, self._device):
            return Health(True)
        return Health(False, f"{last.name} sums on {self._device} are not exact any more; restart the server")

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        """Compiles a float ONNX model; see `npu_server.seam.Backend.compile`."""
        return compile_program(
            model,
            ranges,
            self._profile,
            EmulatorKernels(
                self._profile,
                self._device,
                self._examine().trusted,
                examine_levels(self._levels).trusted,
            ),
            MAX_BATCH,
        )

    def _examine(self) -> Verdict[Method]:
        return examine(self._methods, self._device)

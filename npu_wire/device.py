"""What an NPU is and can do, as both sides tell it: in the seam, on the wire, in checkpoints and reports."""

from dataclasses import dataclass

from npu_wire.v1 import device_pb2


@dataclass(frozen=True)
class Fingerprint:
    """Identity of the arithmetic: equal `profile_hash` promises equal bits.

    Attributes:
        backend: name of the backend that answers.
        vendor: vendor of the chip or runtime.
        model: model of the chip or runtime.
        firmware: version of firmware, runtime or emulator.
        profile: name of the numerics profile.
        profile_hash: SHA-256 (hex) of the canonical profile.
    """

    backend: str
    vendor: str
    model: str
    firmware: str
    profile: str
    profile_hash: str


@dataclass(frozen=True)
class Capabilities:
    """What a backend is and can do; pure data.

    Attributes:
        fingerprint: identity of the arithmetic.
        operators: ONNX operators that it takes.
        max_batch: largest batch.
        deterministic: equal input gives equal bits.
        concurrency: programs that compute at the same time.
        location: where it computes.
        failed_kernels: kernels that the backend found wrong on this machine when it was opened; exact ones
            stand in for them, so that bits are equal and time is lost.
        kernels: what computes convolutions and fully connected layers here; "": nothing to choose from.
    """

    fingerprint: Fingerprint
    operators: tuple[str, ...]
    max_batch: int
    deterministic: bool = True
    concurrency: int = 1
    location: str = "cpu"
    failed_kernels: tuple[str, ...] = ()
    kernels: str = ""

    @property
    def profile(self) -> str:
        """Name of the numerics profile."""
        return self.fingerprint.profile

    @property
    def profile_hash(self) -> str:
        """SHA-256 (hex) of the canonical numerics profile."""
        return self.fingerprint.profile_hash


def fingerprint_to_proto(mark: Fingerprint) -> device_pb2.Fingerprint:
    """Encodes an identity."""
    return device_pb2.Fingerprint(
        backend=mark.backend,
        vendor=mark.vendor,
        model=mark.model,
        firmware=mark.firmware,
        profile=mark.profile,
        profile_hash=mark.profile_hash,
    )


def capabilities_to_proto(device: Capabilities) -> device_pb2.Capabilities:
    """Encodes abilities; the identity is a message of its own."""
    return device_pb2.Capabilities(
        operators=device.operators,
        max_batch=device.max_batch,
        deterministic=device.deterministic,
        concurrency=device.concurrency,
        location=device.location,
        failed_kernels=device.failed_kernels,
        kernels=device.kernels,
    )


def capabilities_from_proto(mark: device_pb2.Fingerprint, abilities: device_pb2.Capabilities) -> Capabilities:
    """Decodes both."""
    return Capabilities(
        Fingerprint(mark.backend, mark.vendor, mark.model, mark.firmware, mark.profile, mark.profile_hash),
        tuple(abilities.operators),
        abilities.max_batch,
        abilities.deterministic,
        abilities.concurrency,
        abilities.location,
        tuple(abilities.failed_kernels),
        abilities.kernels,
    )

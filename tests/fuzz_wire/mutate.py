"""Messages and sessions that were legal once: bytes, fields and order changed at random."""

import random
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_EXTREMES = (0, 1, 127, 128, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1e-45, -1.0, 3.4e38, float("inf"), float("-inf"), float("nan"))
_WORDS = (
    "",
    " ",
    "a" * 1024,
    "b" * 1025,
    "c" * 100_000,
    "\0",
    "../../etc/passwd",
    "\x1b[31m\n\r",
    "%s%n",
    "名前",
)
_BITS = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_ENUM: (-(2**31), 2**31 - 1),
}


def mutate_bytes(rng: random.Random, message: bytes) -> bytes:
    """The message with one to three changes that know nothing of its meaning."""
    raw = bytearray(message)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(8):
            case 0 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                del raw[at:]
            case 2:
                raw[at:at] = rng.randbytes(rng.randint(1, 64))
            case 3:
                del raw[at : at + rng.randint(1, 64)]
            case 4:
                raw[at:at] = raw[at : at + rng.randint(1, 200)]
            case 5:
                raw[at : at + 1] = b"\xff" * 9 + b"\x01"  # a varint that is -1
            case 6:
                raw[at : at + 1] = rng.choice((b"\x00", b"\x7f", b"\x80", b"\xff"))
            case _:
                raw += rng.choice((b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 200, b"\xfa\xff\xff\xff\x0f\x01"))
    return bytes(raw)


def mutate_field(rng: random.Random, message: Message) -> None:
    """Sets one field, somewhere in the message, to something extreme."""
    fields = [field for field in message.DESCRIPTOR.fields if rng.random() < 0.7] or list(
        message.DESCRIPTOR.fields
    )
    if not fields:
        return
    field = rng.choice(fields)
    value = getattr(message, field.name)
    if field.is_repeated:
        if field.message_type is not None:
            if value and rng.random() < 0.5:
                mutate_field(rng, rng.choice(value))
            else:
                value.add()
        elif rng.random() < 0.3:
            del value[:]
        else:
            value.extend(_extreme(rng, field) for _ in range(rng.choice((1, 9, 5000))))
    elif field.message_type is not None:
        mutate_field(rng, value)
    else:
        setattr(message, field.name, _extreme(rng, field))


def mutate_sequence(rng: random.Random, messages: Sequence[bytes], spare: Sequence[bytes]) -> list[bytes]:
    """The messages in another order, with some lost, doubled, changed, or put in from elsewhere."""
    result = list(messages)
    for _ in range(rng.randint(1, 3)):
        if not result:
            return result
        at = rng.randrange(len(result))
        match rng.randrange(7):
            case 0:
                del result[at]
            case 1:
                result.insert(at, result[at])
            case 2:
                other = rng.randrange(len(result))
                result[at], result[other] = result[other], result[at]
            case 3:
                result[at] = mutate_bytes(rng, result[at])
            case 4:
                result.insert(at, rng.choice(spare))
            case 5:
                del result[at:]
            case _:
                rng.shuffle(result)
    return result


def _extreme(rng: random.Random, field: FieldDescriptor) -> Any:
    if field.type in _BITS:
        low, high = _BITS[field.type]
        fitting = [value for value in (*_EXTREMES, *(-v for v in _EXTREMES)) if low <= value <= high]
        return rng.choice(fitting)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.choice((0, 1, 3, 4096, 300_000)))
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(_WORDS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    return rng.choice(_FLOATS)

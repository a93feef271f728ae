"""The trainer of the soak, a process of its own: `python -m tests.soak.trainer ADDRESS SEED`.

Every batch has random codes; tensors are checked when they come and again when they are dropped, some batches
later, by what is computed here. It prints a line a batch and never ends by itself.
"""

import itertools
import os
import random
import sys
from collections import deque
from pathlib import Path

import numpy as np

from npu_wire.layer_map import Int8Array
from tests.soak.device import LAYERS, SHAPE, expected
from trainer_client.npu.connection import connect

_MOST_HELD = 30


def shared_bytes() -> int:
    """What this process maps of a server's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if "memfd:npu-tensors" in line]
    return sum(int(end, 16) - int(begin, 16) for begin, end in spans)


def main() -> None:
    """Trains until it is killed; exit status 1 when bits are wrong."""
    address, seed = sys.argv[1], int(sys.argv[2])
    rng, chance = np.random.default_rng(seed), random.Random(seed)
    held: deque[tuple[Int8Array, int, Int8Array]] = deque()
    npu = connect(address, timeout_s=60)
    session = npu.compile(b"model", {"x": (-1.0, 1.0)})
    for number in itertools.count():
        data = rng.integers(-128, 128, (chance.randint(1, 3), *SHAPE), dtype=np.int8)
        pending = session.submit({"x": data}, range(LAYERS))
        for layer in range(LAYERS):
            tensor = pending.tensor(layer)
            check(data, layer, tensor)
            held.append((data, layer, tensor))
        del pending, tensor
        while len(held) > chance.randint(0, _MOST_HELD):
            index = chance.randrange(len(held))  # in no order
            check(*held[index])
            del held[index]
        if number % 20 == 0:
            threads, files = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("task", "fd"))
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            print(number, threads, files, memory, shared_bytes(), session.way.endswith("shared memory"))
        else:
            print(number)
        sys.stdout.flush()


def check(data: Int8Array, layer: int, tensor: Int8Array) -> None:
    """Ends the process when the bits are not those of that batch and layer."""
    if not np.array_equal(expected(data, layer), tensor):
        print("wrong bits", flush=True)
        raise SystemExit(1)


if __name__ == "__main__":
    main()

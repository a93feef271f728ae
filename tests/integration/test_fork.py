"""A process that was forked from the trainer is told at once that the connection is not its own."""

from test_embedded import trainer

WORKERS = """
import warnings
import numpy as np
from torch.utils.data import DataLoader
from npu_wire.errors import ServerUnavailable

session = npu.compile(b"model", {"t0": (-1.0, 1.0)})
one = np.zeros((1, 2, 4, 4), np.int8)
pending = session.submit({"t0": one}, ())
uses = [
    lambda: npu.info,
    lambda: npu.compile(b"model", {"t0": (-1.0, 1.0)}),
    lambda: session.submit({"t0": one}, ()),
    lambda: session.push_weights({"bias": np.array(2, np.float32)}),
    lambda: pending.tensor(2),
]

class InWorker:
    def __len__(self):
        return len(uses)

    def __getitem__(self, index):
        try:
            uses[index]()
        except ServerUnavailable as error:
            return str(error)
        return "no error"

warnings.simplefilter("ignore")
for (told,) in DataLoader(InWorker(), num_workers=1, multiprocessing_context="fork"):
    print(told)
print(pending.tensor(2).shape, session.submit({"t0": one}, ()).tensor(2).shape)
"""


def test_a_dataloader_worker_that_was_forked_is_told_at_once(plugin: None) -> None:
    """Every use, by name of both processes and with the remedy; in the trainer all goes on."""
    with trainer(WORKERS) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        *told, last = parent.stdout.read().splitlines()
    assert len(told) == 5
    for message in told:
        assert f"belongs to process {parent.pid}, which process" in message
        assert "multiprocessing_context='spawn'" in message
    assert last == "(1, 2, 4, 4) (1, 2, 4, 4)"
    assert parent.returncode == 0

"""What every child would do again: imported once, in the process that children are forked from.

An export of one layer builds the exporter's tables of operators, which takes seconds.
"""

import contextlib
import io
import logging
import warnings

import numpy  # noqa: F401
import torch
import transformers  # noqa: F401
from architectures import side_by_side  # noqa: F401

from trainer_client.qat.capture import capture

logging.disable(logging.WARNING)
torch.set_num_threads(1)
with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")
    capture(torch.nn.Linear(2, 2), torch.zeros(2, 2))

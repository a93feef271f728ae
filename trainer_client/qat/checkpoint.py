"""What `QatModule.state_dict()` holds beside the user's model: tensors only, so any format takes it.

Keys begin with "npu." (the model's own with "model."): the range of each activation as float64 (min, max),
which is exact, and the profile that the ranges were trained with, its name and hash as the bytes of their
text.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from npu_wire.device import Capabilities
from npu_wire.errors import InvalidInput
from trainer_client.qat.calibrate import Range

_OWN = "npu."
_RANGE, _PROFILE, _HASH = "npu.range.", "npu.profile", "npu.profile_hash"


def to_tensors(ranges: Mapping[str, Range], info: Capabilities) -> dict[str, Tensor]:
    """The entries of a state dict.

    Args:
        ranges: activation ranges by ONNX value name.
        info: the NPU that the model is trained with.
    """
    own = {_PROFILE: _of_text(info.profile), _HASH: _of_text(info.profile_hash)}
    bounds = {f"{_RANGE}{name}": torch.tensor(pair, dtype=torch.float64) for name, pair in ranges.items()}
    return own | bounds


def take_ranges(
    state: Mapping[str, Tensor], prefix: str, info: Capabilities
) -> tuple[dict[str, Range] | None, frozenset[str]]:
    """Reads what `to_tensors` wrote, and warns if it was trained with another arithmetic.

    Args:
        state: a state dict.
        prefix: of the module's own keys in it.
        info: the NPU that the model shall run on now.

    Returns:
        Ranges by value name (None: the state dict is not of a `QatModule`), and the keys that were read.

    Raises:
        InvalidInput: a range is no pair of numbers with min < max.
    """
    keys = frozenset(key for key in state if key.startswith(prefix + _OWN))
    if prefix + _HASH not in keys:
        return None, keys
    trained_with = _to_text(state[prefix + _HASH])
    if trained_with != info.profile_hash:
        warnings.warn(
            f"this checkpoint was trained in the loop with the NPU profile "
            f"'{_to_text(state[prefix + _PROFILE])}' (hash {trained_with[:12]}), and the model is connected "
            f"to '{info.profile}' (hash {info.profile_hash[:12]}), which computes other bits: accuracy and "
            "losses will differ. Connect to the profile of the checkpoint, or train some epochs here first.",
            stacklevel=2,
        )
    ranges = {}
    for key in state:
        if key.startswith(prefix + _RANGE):
            bounds = state[key].double().flatten().tolist()
            if len(bounds) != 2 or not bounds[0] < bounds[1]:
                raise InvalidInput(
                    f"checkpoint: '{key}' is {bounds}; expected the two numbers min < max; "
                    "calibrate again in its place"
                )
            ranges[key.removeprefix(prefix + _RANGE)] = (bounds[0], bounds[1])
    return ranges, keys


def _of_text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _to_text(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode(errors="replace")

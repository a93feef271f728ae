"""What a profile says of every operator that it takes: who judges it, with which exceptions, or nobody."""

from collections.abc import Mapping

from npu_server.compile.reading.operators import operators_of
from npu_server.numerics.functions import FUNCTIONS
from npu_server.numerics.profile import Profile
from npu_server.numerics.rules import HOST_OPERATORS

_CONVOLUTIONS = (
    "convolution",
    "pointwise convolution",
    "dilated convolution",
    "depthwise convolution",
    "grouped convolution",
)
# One number, or one a channel, becomes a layer of weights.
_WITH_CONSTANTS = ("depthwise convolution", "constant operands")
_MOVES_CODES = (
    "Cast",
    "CastLike",
    "DepthToSpace",
    "Dropout",
    "Expand",
    "Flatten",
    "Gather",
    "GlobalMaxPool",
    "Identity",
    "ReduceMax",
    "ReduceMin",
    "Reshape",
    "SequenceAt",
    "Slice",
    "SpaceToDepth",
    "Split",
    "SplitToSequence",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
_OTHER_FUNCTIONS = ("IsNaN", "Where", *(name for name in FUNCTIONS if name != "GeluTanh"))

SUBJECTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_MOVES_CODES, ()),
    **dict.fromkeys(_OTHER_FUNCTIONS, ("other functions",)),
    **dict.fromkeys(HOST_OPERATORS, ("host float",)),
    **dict.fromkeys(("Clip", "Relu"), ("relu",)),
    **dict.fromkeys(("Max", "Min"), ("relu", "max and min")),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), ("mean",)),
    "Add": ("add", *_WITH_CONSTANTS),
    "AveragePool": ("average pool",),
    "BatchNormalization": ("pointwise convolution", "depthwise convolution"),
    "Concat": ("concat", "constant operands"),
    "Conv": _CONVOLUTIONS,
    "ConvTranspose": ("transposed convolution",),
    "Div": (*_WITH_CONSTANTS, "host float"),
    "Gemm": ("fully connected",),
    "HardSwish": ("hard swish",),
    "LeakyRelu": ("leaky relu",),
    "MatMul": ("fully connected", "product of activations"),
    "MaxPool": ("max pool",),
    "Mul": ("mul", *_WITH_CONSTANTS),
    "PRelu": ("prelu",),
    "Pad": ("pad",),
    "ReduceSum": ("reduce sum",),
    "Resize": ("resize nearest", "resize bilinear"),
    "Sigmoid": ("sigmoid",),
    "Sub": ("sub", *_WITH_CONSTANTS),
    "Tanh": ("tanh",),
}
"""ONNX operator -> what `Profile.unjudged` and the conformance matrix call it; nothing where it moves codes
and computes none."""


def verdicts(profile: Profile) -> dict[str, str]:
    """For each operator that a profile takes what is known of it, in a phrase."""
    return {operator: _verdict(SUBJECTS[operator], profile) for operator in operators_of(profile)}


def _verdict(subjects: tuple[str, ...], profile: Profile) -> str:
    if not subjects:
        return "moves codes, computes none"
    open_ones = [
        entry
        for subject in subjects
        for entry in profile.unjudged
        if entry == subject or entry.startswith(f"{subject}: ")
    ]
    if not profile.judged_by or set(subjects) <= set(open_ones):
        return "judged by nobody"
    judges = f"judged by {', '.join(profile.judged_by)}"
    return f"{judges}, but for {'; '.join(open_ones)}" if open_ones else judges

"""A compiler with a defect is found out: its functions, each with one expression changed, in process."""

import inspect
import textwrap
from collections.abc import Callable

import pytest

from npu_server.compile.planning import fusion, lowering, weights
from npu_server.compile.reading import operators, operators_elementwise, windows
from npu_server.numerics import scales

from .comparison import ONNX_RUNTIME, judge
from .random_networks import Subject, draw
from .static_comparison import judge_static

DEFECTS: dict[str, tuple[Callable, str, str]] = {
    "bias truncated": (scales.quantize_weights, "np.rint(steps)", "np.trunc(steps)"),
    "bias floored": (scales.quantize_weights, "np.rint(steps)", "np.floor(steps)"),
    "weight scale from max instead of absmax": (
        scales.quantize_weights,
        "np.maximum(rows.max(axis=1), -rows.min(axis=1))",
        "np.maximum(rows.max(axis=1), 0)",
    ),
    "bias too large for its scale": (
        scales.quantize_weights,
        "np.maximum(largest / LARGEST_WEIGHT, holding_bias)",
        "largest / LARGEST_WEIGHT",
    ),
    "weight codes truncated": (scales.quantize_weights, "np.rint(ratios", "np.trunc(ratios"),
    "weight scale over 128 steps": (scales.quantize_weights, "largest / LARGEST_WEIGHT", "largest / 128"),
    "dead channels at scale 1": (scales.quantize_weights, "output_scale / input_scale", "1.0"),
    "bias without the input's scale": (scales.quantize_weights, " * input_scale)", ")"),
    "zero point floored": (scales.activation_quantization, "np.rint", "np.floor"),
    "zero point from -127": (scales.activation_quantization, "INT8_MIN - low", "INT8_MIN + 1 - low"),
    "scale over 256 steps": (scales.activation_quantization, "/ 255 if", "/ 256 if"),
    "range without 0": (
        scales.activation_quantization,
        "min(float(low), 0.0), max(float(high), 0.0)",
        "float(low), float(high)",
    ),
    "fused clip bound off by one": (lowering._clamped_codes, "high = code_of(", "high = 1 + code_of("),
    "fused clip bound truncated": (scales.code_of, "round_half_away(np.asarray(ratio))", "np.trunc(ratio)"),
    "clamp forgotten": (lowering._layer, "operation.clamp or Clamp()", "Clamp()"),
    "batch norm without epsilon": (weights._scale_and_shift, " + np.float32(affine.epsilon)", ""),
    "batch norm without mean": (weights._scale_and_shift, "beta - mean * scale", "beta"),
    "bias not folded": (weights.fold, "bias * scale + shift", "bias + shift"),
    "kernel flipped": (
        weights.fold,
        "if isinstance(operator, Conv) else weight",
        "[..., ::-1, ::-1] if isinstance(operator, Conv) else weight",
    ),
    "kernel transposed": (
        weights.fold,
        "if isinstance(operator, Conv) else weight",
        "[..., ::-1] if isinstance(operator, Conv) else weight",
    ),
    "alpha ignored": (weights.fold, "source.alpha != 1.0", "False"),
    "beta ignored": (weights._bias, " * np.float32(source.beta)", ""),
    "division as multiplication": (weights.scale_and_shift, "one / value", "value"),
    "constant minus activation reversed": (operators_elementwise._binary, 'left and op == "sub"', "False"),
    "SAME_UPPER and SAME_LOWER swapped": (windows._window, 'auto == "SAME_UPPER"', 'auto == "SAME_LOWER"'),
    "pads left before top": (windows._pads, "pads[0], pads[1]", "pads[1], pads[0]"),
    "pads end before begin": (
        windows._pads,
        "pads[0], pads[1], pads[2], pads[3]",
        "pads[2], pads[3], pads[0], pads[1]",
    ),
    "SAME without dilation": (
        windows._window,
        "zip(size, strides, reach, strict=True)",
        "zip(size, strides, kernel_shape, strict=True)",
    ),
    "padding counted in no average": (
        operators._pool,
        'bool(integer(node, "count_include_pad", 0))',
        "False",
    ),
    "padding folded upside down": (
        fusion._fold_pad,
        "own[0] + rows[0], own[1] + columns[0], own[2] + rows[1], own[3] + columns[1]",
        "own[0] + rows[1], own[1] + columns[1], own[2] + rows[0], own[3] + columns[0]",
    ),
    "joined in another order": (
        operators._concat,
        "[v.name for v in views.values()]",
        "[v.name for v in views.values()][::-1]",
    ),
}


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    """Networks on which the compiler as it is has no differences."""
    drawn = [draw(seed) for seed in range(40)]
    assert not any(judge(subject, ONNX_RUNTIME).differences for subject in drawn[:6])
    return drawn


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_found(defect: str, subjects: list[Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's outputs differ from those of the changed compiler."""
    _put_in(defect, monkeypatch)
    found = (text for subject in subjects for text in judge(subject, ONNX_RUNTIME).differences)
    assert any("outputs" in text for text in found)


@pytest.mark.parametrize(
    "defect",
    [
        "bias truncated",
        "weight scale from max instead of absmax",
        "weight codes truncated",
        "zero point floored",
        "range without 0",
        "batch norm without epsilon",
        "kernel flipped",
    ],
)
def test_defect_is_found_by_quantize_static(
    defect: str, subjects: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers differ from those of ONNX Runtime's own quantizer."""
    _put_in(defect, monkeypatch)
    assert any(judge_static(subject).differences for subject in subjects)


def _put_in(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchanges one expression in the source of a function, and the function's code."""
    decorated, old, new = DEFECTS[defect]
    source = textwrap.dedent(inspect.getsource(decorated))
    assert source.count(old) == 1, f"{decorated.__qualname__} no longer says {old!r} once"
    function, names = inspect.unwrap(decorated), {}
    exec(compile(source.replace(old, new), f"<{defect}>", "exec"), dict(function.__globals__), names)
    monkeypatch.setattr(function, "__code__", inspect.unwrap(names[function.__name__]).__code__)

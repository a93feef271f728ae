"""`npu-server profiles` and the documentation of profiles."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from single_layers import BACKENDS, Scale, single_layer

from npu_server.__main__ import main
from npu_server.numerics.profile import Profile, list_profiles, load_profile
from npu_server.numerics.version import ARITHMETIC_VERSION
from npu_server.profile_pages import attribute_meanings, describe_keys
from npu_server.seam import Backend, BackendOptions

PAGE = Path(__file__).parents[2] / "docs" / "describe-your-npu.md"


def test_every_key_has_a_meaning() -> None:
    """No field of any rule lacks its line in the docstring, from which the pages are made."""
    for section in dataclasses.fields(Profile):
        if dataclasses.is_dataclass(section.type):
            keys = {field.name for field in dataclasses.fields(section.type)}
            assert keys == set(attribute_meanings(section.type)), section.name


def test_list_names_every_profile(capsys: pytest.CaptureFixture[str]) -> None:
    """One line a profile: its name first, then what it is."""
    assert main(["profiles"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(list_profiles())
    assert "saturates" in lines[0]


def test_show_prints_values_meanings_and_hash(capsys: pytest.CaptureFixture[str]) -> None:
    """The hash is that of the fingerprint; an exception shows with its own rule."""
    assert main(["profiles", "show", "litert-reference"]) == 0
    printed = capsys.readouterr().out
    assert f"{load_profile('litert-reference').hash} (arithmetic version {ARITHMETIC_VERSION})" in printed
    assert "LiteRT reference" in printed
    rows = {key: value for key, value, _ in describe_keys(load_profile("litert-reference"))}
    assert rows["accumulator.bits"] == "32"
    assert rows["exceptions.fully_connected"].startswith('"float64", "half_away", 1')
    assert "exceptions.grouped" not in rows


@pytest.mark.parametrize("arguments", [["shw"], ["show"], ["show", "nothing"], ["show", "a", "b"]])
def test_wrong_arguments_are_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The message says how it is written, or which profiles there are."""
    try:
        status = main(["profiles", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status == (1 if arguments == ["show", "nothing"] else 2)
    assert re.search(r"usage: npu-server profiles( show)? |shipped profiles: acc16", capsys.readouterr().err)


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_example_of_the_documentation(backend: type[Backend], tmp_path: Path) -> None:
    """The page's file loads, compiles and computes the page's number: 97, where a wide register gives 127."""
    text = PAGE.read_text("utf-8")
    path = tmp_path / "my-npu.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", text, re.DOTALL).group(1), "utf-8")
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], "gemm", transB=1)]
    weights = {"w": np.ones((1, 48), np.float32)}
    # The model is that of an affine profile; the ranges make scales 1 and 32 without zero points.
    model = single_layer("tflm", nodes, (48,), {"x": Scale(1.0, 0), "y": Scale(32.0, 0)}, weights).model
    ranges = {"x": (-127.0, 127.0), "y": (-127.0 * 32, 127.0 * 32)}
    batch = np.array([[127] * 40 + [-127] * 8], np.int8)

    def code(profile: str) -> int:
        program = backend(BackendOptions(profile=profile)).compile(model, ranges)
        return int(list(program.forward(program.layer_map.named(batch), ()))[-1].data.reshape(-1)[0])

    assert code(str(path)) == 97
    path.write_text(path.read_text("utf-8").replace("bits = 20", "bits = 32"), "utf-8")
    assert code(str(path)) == 127

"""A tiny configuration of any `transformers` model: one rule for all of them, and exceptions as data."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

_TABLE = Path(__file__).with_name("tiny.toml")


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(_TABLE.read_text())


def shapes_of_inputs(class_name: str, model_type: str) -> dict[str, list[int]]:
    """Shapes without the batch, by name, where a class or model type takes other inputs than the rule's."""
    inputs = _table()["inputs"]
    shapes: dict[str, list[int]] = inputs.get(class_name, inputs.get(model_type, {}))
    return shapes


def without_labels(class_name: str) -> bool:
    """Whether the labels of a class are none of its group's kind."""
    return class_name in _table()["without_labels"]["classes"]


def shrunk(config_class: Any, **more: Any) -> Any:
    """A configuration of `config_class` that builds in a moment.

    Every attribute that the rule knows gets its small value, in the shape that it has by default: a list
    stays a list of its length. Nested configurations are shrunk alike. What a model type asks for beyond
    that is in `tiny.toml`, and wins.

    Args:
        config_class: a subclass of `transformers.PreTrainedConfig`.
        more: attributes that win over all others, such as `num_labels`.
    """
    from transformers import PreTrainedConfig

    default = config_class()
    rule, exceptions = _table()["rule"], _table()["model"].get(config_class.model_type, {})
    small: dict[str, Any] = {}
    for name in default.to_dict():
        value = getattr(default, name, None)
        if isinstance(value, PreTrainedConfig):
            small[name] = _nested(value, exceptions.get(name, {}))
        elif name in rule and value is not None:
            small[name] = _in_the_shape_of(value, rule[name])
    small |= {name: value for name, value in exceptions.items() if not isinstance(value, dict)}
    for name, value in exceptions.items():
        if isinstance(value, dict) and name not in small:
            small[name] = _nested_from(value)
    return config_class(**small | more)


def _nested(given: Any, exceptions: dict[str, Any]) -> Any:
    """The nested configuration in small; what its owner chose differently from its class stays."""
    if "model_type" in exceptions:
        return _nested_from(exceptions)
    usual = type(given)().to_dict()
    known = {*_table()["rule"], *given.sub_configs, "out_features", "stage_names"}
    chosen = {
        name: value
        for name, value in given.to_dict().items()
        if name not in known and value != usual.get(name)
    }
    own = _table()["model"].get(given.model_type, {})
    return shrunk(type(given), **{k: v for k, v in chosen.items() if k not in own} | exceptions)


def _nested_from(values: dict[str, Any]) -> Any:
    """The configuration that a table with a `model_type` describes; without one, the table itself."""
    from transformers import CONFIG_MAPPING

    if "model_type" not in values:
        return values
    given = {name: value for name, value in values.items() if name != "model_type"}
    return shrunk(CONFIG_MAPPING[values["model_type"]], **given)


def _in_the_shape_of(default: Any, small: Any) -> Any:
    """A small value as many times as the default has stages; a list of small values is a pyramid's."""
    stages = small if isinstance(small, list) else [small]
    if isinstance(default, list | tuple):
        return [stages[min(i, len(stages) - 1)] for i in range(len(default))]
    return stages[0]

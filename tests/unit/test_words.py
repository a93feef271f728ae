"""Words that leave the server: they fit, and they stay on their line."""

import logging
import sys
from urllib.parse import quote

import pytest

from npu_server.service.words import LineFormatter, for_status, on_one_line


@pytest.mark.parametrize("character", ["x", "%", "é", "中", "🙂", "\n", "\ud800"])
def test_a_status_fits_however_it_is_encoded(character: str) -> None:
    """Percent-encoded as gRPC does it, by Python's own encoder; what is short stays whole."""
    text = for_status(character * 10_000)
    assert len(quote(text, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")) < 4_100
    assert text.endswith("…")
    if character != "\ud800":
        assert for_status(character * 100) == character * 100


def test_a_long_text_loses_its_middle() -> None:
    """In a log; where it begins and how it ends both say something."""
    text = on_one_line("begin" + "x" * 5000 + "end")
    assert len(text) < 1100
    assert text.startswith("beginx")
    assert text.endswith("xend")


def test_a_record_is_one_line_whatever_it_says() -> None:
    """Line ends, escape sequences and turned text in a name, in an exception's as well."""
    formatter = LineFormatter("%(levelname)s %(message)s")
    evil = "layer\n2026 ERROR forged\r\x1b[2J\u2028\u202e\x85"
    try:
        raise ValueError(evil)
    except ValueError:
        record = logging.LogRecord("n", logging.INFO, "f", 1, "weight '%s'", (evil,), sys.exc_info())
    first, *rest = formatter.format(record).split("\n")
    assert first == r"INFO weight 'layer\x0a2026 ERROR forged\x0d\x1b[2J\u2028\u202e\x85'"
    assert rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)

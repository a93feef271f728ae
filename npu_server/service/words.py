"""Words that leave the server: in a status they must fit, in a log they must stay on their line."""

import logging
import re

# gRPC drops metadata beyond 8 KB, and with it status and class; a byte that is not printable ASCII takes 3.
_STATUS_BYTES = 4_000
_LOG_CHARACTERS = 1_000
# C0 and C1 controls, line and paragraph separators, and what turns the direction of text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def for_status(text: str) -> str:
    """The text, cut so that it fits a gRPC status however it is encoded."""
    text = text.encode("utf-8", "replace").decode()
    room = _STATUS_BYTES
    for i, character in enumerate(text):
        room -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        if room < 0:
            return text[:i] + "…"
    return text


def on_one_line(text: str) -> str:
    r"""The text with control characters as \x0a, cut in the middle when it is long."""
    if len(text) > _LOG_CHARACTERS:
        text = f"{text[: _LOG_CHARACTERS // 2]} … {text[-_LOG_CHARACTERS // 2 :]}"
    return _CONTROL.sub(lambda match: _escaped(match.group()), text)


class LineFormatter(logging.Formatter):
    """Writes each record so that nothing that a client has named can look like another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line, without control characters."""
        record.message = on_one_line(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802
        """The traceback, indented, each line without control characters."""
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type]
        return "\n".join("    " + on_one_line(line) for line in lines)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

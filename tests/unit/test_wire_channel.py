"""Addresses, tokens and credential files."""

from pathlib import Path

import pytest

from npu_wire.channel import (
    channel_credentials,
    parse_endpoint,
    read_token,
    server_credentials,
    token_matches,
    token_metadata,
)
from npu_wire.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "target", "loopback"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051", True),
        ("127.9.9.9:1", "127.9.9.9:1", True),
        ("localhost:0", "localhost:0", True),
        ("[::1]:7", "[::1]:7", True),
        ("unix:/tmp/a.sock", "unix:/tmp/a.sock", True),
        ("unix:///tmp/a.sock", "unix:/tmp/a.sock", True),
        ("0.0.0.0:50051", "0.0.0.0:50051", False),
        ("[::]:50051", "[::]:50051", False),
        ("board-7:50051", "board-7:50051", False),
        ("10.0.0.1:65535", "10.0.0.1:65535", False),
    ],
)
def test_addresses(text: str, target: str, loopback: bool) -> None:
    """What gRPC gets, and whether other machines can reach it."""
    endpoint = parse_endpoint(text)
    assert (endpoint.target, endpoint.is_loopback) == (target, loopback)


@pytest.mark.parametrize(
    "text", ["", "board-7", ":50051", "host:", "host:65536", "host:-1", "host:x", "unix:"]
)
def test_what_is_no_address(text: str) -> None:
    """The message shows what was given and what to write."""
    with pytest.raises(InvalidInput, match=r"write .*unix:"):
        parse_endpoint(text)


def test_tokens_match_exactly(tmp_path: Path) -> None:
    """Surrounding white space of the file does not count, everything else does."""
    path = tmp_path / "token"
    path.write_text("  s3cret\n")
    token = read_token(path)
    ((key, header),) = token_metadata(token)
    assert (token, key, header) == ("s3cret", "authorization", "Bearer s3cret")
    assert token_matches(header, token)
    for wrong in ("", "s3cret", "Bearer s3cre", "Bearer s3cret2", "bearer s3cret", "Bearer ü"):
        assert not token_matches(wrong, token)
    assert token_metadata(None) == ()


@pytest.mark.parametrize("content", ["", "two words", "ümlaut", "a\nb"])
def test_what_is_no_token(tmp_path: Path, content: str) -> None:
    """Empty, several words, other characters than a header can carry."""
    path = tmp_path / "token"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput, match="one word"):
        read_token(path)


def test_credential_files_that_cannot_be_read(tmp_path: Path) -> None:
    """The message names the role and the file."""
    missing = tmp_path / "nothing.pem"
    with pytest.raises(InvalidInput, match=r"CA file '.*nothing\.pem': No such file"):
        channel_credentials(missing, None, None)
    with pytest.raises(InvalidInput, match="TLS key file"):
        server_credentials(missing, missing, None)
    with pytest.raises(InvalidInput, match="both or neither"):
        channel_credentials(None, missing, None)

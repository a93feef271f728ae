"""Addresses, tokens and credential files."""

from pathlib import Path

import pytest
import trustme

from npu_wire.channel import (
    Security,
    channel_credentials,
    open_channel,
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


WRONG_TOKENS = {
    "": "it is empty",
    "two words": "white space",
    "ümlaut": "other characters",
    "a\nb": "it has a line break",
}


@pytest.mark.parametrize("content", WRONG_TOKENS)
def test_what_is_no_token(tmp_path: Path, content: str) -> None:
    """Empty, several words or lines, characters that no header carries: in a file or given directly."""
    path = tmp_path / "token"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput, match=f"token file '{path}' must be one word.*{WRONG_TOKENS[content]}"):
        read_token(path)
    with pytest.raises(InvalidInput, match=f"the token must be one word.*{WRONG_TOKENS[content]}"):
        open_channel(parse_endpoint("127.0.0.1:1"), Security(token=content))


@pytest.mark.parametrize("security", [Security(token="secret"), Security()])
def test_a_token_stays_here_where_others_could_read_it(security: Security) -> None:
    """Refused for another machine without TLS; nothing else is."""
    if security.token is None:
        open_channel(parse_endpoint("board-7:1"), security).close()
        return
    with pytest.raises(InvalidInput, match=r"would travel unencrypted; use TLS: tls_ca=FILE"):
        open_channel(parse_endpoint("board-7:1"), security)
    open_channel(parse_endpoint("localhost:1"), security).close()


def test_a_socket_has_room_for_107_bytes() -> None:
    """Linux cuts what is longer; the message says how long it is."""
    assert parse_endpoint("unix:/" + "x" * 106).path
    with pytest.raises(InvalidInput, match="at most 107 bytes, this one has 108"):
        parse_endpoint("unix:/" + "x" * 107)


def test_credential_files_that_cannot_be_read(tmp_path: Path) -> None:
    """The message names the role and the file."""
    missing = tmp_path / "nothing.pem"
    with pytest.raises(InvalidInput, match=r"CA file '.*nothing\.pem': No such file"):
        channel_credentials(missing, None, None)
    with pytest.raises(InvalidInput, match="TLS key file"):
        server_credentials(missing, missing, None)
    with pytest.raises(InvalidInput, match="both or neither"):
        channel_credentials(None, missing, None)


class Pair:
    """A certificate and its key in files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        issued = trustme.CA().issue_cert("localhost")
        issued.private_key_pem.write_to_path(str(self.key))
        issued.cert_chain_pems[0].write_to_path(str(self.cert))


def test_credential_files_that_are_something_else(tmp_path: Path) -> None:
    """Garbage for an authority, another certificate's key, key and certificate swapped: all are told."""
    one, two = Pair(tmp_path / "one"), Pair(tmp_path / "two")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    for wrong in (garbage, one.key):
        with pytest.raises(InvalidInput, match=f"CA file '{wrong}' holds no certificate"):
            channel_credentials(wrong, None, None)
    strangers = f"key '{two.key}' does not belong to the certificate '{one.cert}'"
    with pytest.raises(InvalidInput, match=strangers):
        channel_credentials(None, one.cert, two.key)
    with pytest.raises(InvalidInput, match=strangers):
        server_credentials(one.cert, two.key, None)
    with pytest.raises(InvalidInput, match="both must be PEM"):
        server_credentials(one.key, one.cert, None)
    with pytest.raises(InvalidInput, match="client CA file"):
        server_credentials(one.cert, one.key, garbage)

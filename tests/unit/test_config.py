"""Where settings come from, and what is refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from npu_server.config import DescribeSettings, ServeConfig, ServeSettings
from npu_wire.errors import InvalidInput
from npu_wire.settings import load_settings


def load_serve_config(arguments: list[str]) -> ServeConfig:
    """What `npu-server serve` is told."""
    return load_settings(ServeSettings, arguments, "npu-server serve")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPU_CONFIG", "NPU_BACKEND", "NPU_PROFILE", "NPU_LISTEN", "NPU_LEASE_S"):
        monkeypatch.delenv(name, raising=False)


def test_flags_before_environment_before_file_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four settings, each from the first place that names it."""
    path = tmp_path / "npu.toml"
    path.write_text('backend = "file"\nprofile = "file"\nlease_s = 7.5\n')
    monkeypatch.setenv("NPU_BACKEND", "environment")
    monkeypatch.setenv("NPU_PROFILE", "environment")
    config = load_serve_config(["--config", str(path), "--backend", "flag"])
    assert (config.backend, config.profile, config.lease_s) == ("flag", "environment", 7.5)
    assert config.listen == "127.0.0.1:50051"
    monkeypatch.setenv("NPU_CONFIG", str(path))
    assert load_serve_config([]).lease_s == 7.5


def test_backend_options_are_pairs() -> None:
    """Repeatable, and the value may hold an equals sign."""
    config = load_serve_config(["--backend-option", "a=1", "--backend-option", "b=x=y"])
    assert config.backend_option == {"a": "1", "b": "x=y"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--listen", "0.0.0.0:50051"], "--insecure"),
        (["--listen", "[::]:50051"], "--tls-cert"),
        (["--listen", "nonsense"], "HOST:PORT"),
        (["--http", "0.0.0.0:8080"], "speaks no TLS"),
        (["--http", "unix:/tmp/x"], "must be HOST:PORT"),
        (["--tls-cert", "a.pem"], "come together"),
        (["--tls-client-ca", "a.pem"], "needs --tls-cert"),
        (["--lease-s", "0"], "greater than 0"),
        (["--lease-s", "inf"], "finite"),
        (["--max-in-flight", "0"], "greater than or equal to 1"),
    ],
)
def test_illegal_settings(arguments: list[str], reason: str) -> None:
    """Each is refused before anything starts."""
    with pytest.raises(ValidationError, match=reason):
        load_serve_config(arguments)


def test_beyond_loopback_with_consent_or_tls() -> None:
    """What makes the refusal go away."""
    assert load_serve_config(["--listen", "0.0.0.0:1", "--insecure"]).insecure
    assert ServeConfig(listen="0.0.0.0:1", tls_cert=Path("c"), tls_key=Path("k"), http="off").tls_key == Path(
        "k"
    )


@pytest.mark.parametrize("off", ["", "off"])
def test_http_can_be_turned_off(off: str) -> None:
    """Two spellings."""
    assert not load_serve_config(["--http", off]).http_enabled


def test_an_unknown_key_in_the_file_is_an_error(tmp_path: Path) -> None:
    """A misspelt setting must not be ignored."""
    path = tmp_path / "npu.toml"
    path.write_text('bakend = "emulator"\n')
    with pytest.raises(ValidationError, match="bakend"):
        load_serve_config(["--config", str(path)])
    with pytest.raises(InvalidInput, match="no such file"):
        load_serve_config(["--config", str(tmp_path / "nothing.toml")])


def test_describe_has_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoint from the environment, --json as a flag."""
    monkeypatch.setenv("NPU_ENDPOINT", "board-7:1")
    settings = load_settings(DescribeSettings, ["--json"], "npu-server describe")
    assert (settings.endpoint, settings.json_) == ("board-7:1", True)

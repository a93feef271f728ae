"""Errors that reach nobody: a client that is gone leaves nothing in the log that looks like our fault."""

import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from npu_server.dashboard.http_server import HttpServer
from npu_server.dashboard.pages import create_dashboard
from npu_server.service.interceptors import CallInterceptor
from npu_server.service.stalls import StallWatch
from npu_server.telemetry import DeviceStatus, Status, Telemetry
from npu_wire.errors import SessionLost

TIMEOUT_S = 30.0
STATUS = Status(DeviceStatus("fake", "adder", "x", "0" * 64, "cpu", serving=True), 0, 0, 0, 0, 0, {}, ())


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "single answer"])
def test_a_call_that_fails_after_its_client_has_gone(streams: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A session that is released while a client gives its call up: gRPC has nothing to complain of."""
    begun, gone = threading.Event(), threading.Event()

    def fail(_requests: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(gone.set)
        begun.set()
        gone.wait(TIMEOUT_S)
        raise SessionLost("released")

    def fail_as_stream(requests: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from fail(requests, context)

    handler = (
        grpc.stream_stream_rpc_method_handler(fail_as_stream, bytes, bytes)
        if streams
        else grpc.stream_unary_rpc_method_handler(fail, bytes, bytes)
    )
    stalls = StallWatch()
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool, interceptors=[CallInterceptor(Telemetry(), stalls, TIMEOUT_S)])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("a.Service", {"Fail": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with caplog.at_level(logging.ERROR), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream("/a.Service/Fail")(iter([b"x"]))
        assert begun.wait(TIMEOUT_S)
        call.cancel()
        assert gone.wait(TIMEOUT_S)
        server.stop(None).wait()
        pool.shutdown()
    stalls.close()
    assert [record.message for record in caplog.records] == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"POST /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\nGARBAGE\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabcNO HTTP\r\n\r\n",
    ],
    ids=["chunks that are none", "after the last request", "behind a body"],
)
def test_garbage_behind_a_request(
    garbage: bytes, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The request is answered or refused, and the connection ends without a traceback."""
    http = HttpServer(create_dashboard(lambda: STATUS, Telemetry().registry), "127.0.0.1", 0)
    host, _, port = http.address.rpartition(":")
    with caplog.at_level(logging.ERROR):
        for _ in range(20):
            with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
                connection.sendall(garbage)
                assert connection.recv(4096).startswith(b"HTTP/1.1 ")
        http.close()
    assert "Traceback" not in capsys.readouterr().err  # uvicorn's own logger
    assert [record.message for record in caplog.records] == []

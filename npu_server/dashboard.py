"""HTTP side: health, metrics and status, from telemetry snapshots only."""

import logging
import socket
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from npu_server.telemetry import Status
from npu_wire.errors import InvalidInput

log = logging.getLogger(__name__)


def create_dashboard(status: Callable[[], Status], registry: CollectorRegistry) -> FastAPI:
    """The FastAPI app.

    Args:
        status: takes a snapshot of the server.
        registry: Prometheus metrics.
    """
    app = FastAPI(title="NPU-in-the-Loop server", docs_url=None, redoc_url=None)

    @app.get("/healthz")
    def healthz(response: Response) -> dict[str, str]:
        serving = status().device.serving
        response.status_code = 200 if serving else 503
        return {"status": "serving" if serving else "not serving"}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/api/v1/status")
    def full_status() -> Status:
        return status()

    return app


class HttpServer:
    """Serves an app in a thread of its own and leaves signals to the process's owner.

    Args:
        app: what to serve.
        host: address to bind.
        port: TCP port; 0: any.

    Raises:
        InvalidInput: the address cannot be bound.
    """

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        family, shown = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise InvalidInput(
                f"cannot serve HTTP on {shown}:{port}: {error.strerror}; choose another --http, or off"
            ) from None
        self.address = f"{shown}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        # uvicorn installs signal handlers in the main thread only, which this one is not.
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="npu-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops serving."""
        self._server.should_exit = True
        self._thread.join(5.0)
        self._socket.close()

"""HTTP side: health, metrics and status, from telemetry snapshots only."""

from collections.abc import Callable

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from npu_server.telemetry import Status


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

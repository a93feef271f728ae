"""`npu-server describe`: what the NPU behind an endpoint is."""

import json

import grpc
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from npu_server.config import DescribeSettings
from npu_wire.channel import error_of, open_channel, parse_endpoint, token_metadata
from npu_wire.v1 import npu_pb2, npu_pb2_grpc


def describe(settings: DescribeSettings, console: Console) -> None:
    """Asks and prints.

    Raises:
        NpuError: nobody answers, or the call is refused.
    """
    security = settings.security()
    channel = open_channel(parse_endpoint(settings.endpoint), security)
    with channel:
        try:
            stub = npu_pb2_grpc.NpuServiceStub(channel)  # type: ignore[no-untyped-call]
            answer = stub.Describe(
                npu_pb2.DescribeRequest(), timeout=settings.timeout_s, metadata=token_metadata(security.token)
            )
        except grpc.RpcError as error:
            raise error_of(error, settings.endpoint) from None
    if settings.json_:
        print(json.dumps(MessageToDict(answer, preserving_proto_field_name=True), indent=2))
    else:
        console.print(_table(settings.endpoint, answer))


def _table(endpoint: str, answer: npu_pb2.DescribeResponse) -> Table:
    table = Table(title=f"NPU at {endpoint}", show_header=False)
    for message in (answer.fingerprint, answer.capabilities, answer.limits):
        for field, value in MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        ).items():
            table.add_row(
                field.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value)
            )
        table.add_section()
    return table

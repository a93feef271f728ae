"""The HTTP server: in a thread of its own, closed to strangers' names, and patient with nobody for long."""

import asyncio
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Collection
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from npu_wire.errors import InvalidInput

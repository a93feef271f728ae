"""The server's clock in ours."""


class ServerClock:
    """Relates the server's monotonic clock to this process's, and keeps doing so while the two drift apart.

    A round trip at the beginning tells the offset. Every layer that arrives then proves bounds of it, free of
    charge: the device did not begin before the batch was sent, and nothing arrives before it was computed.
    The offset is moved into these bounds and no further, so a timing never contradicts its cause.

    Args:
        offset_ns: the server's clock minus ours, as a round trip tells it.
    """

    def __init__(self, offset_ns: int) -> None:
        self._offset_ns = offset_ns

    def observe(self, sent_ns: int, start_ns: int, end_ns: int, arrival_ns: int) -> None:
        """Takes what a layer proves.

        Args:
            sent_ns: our clock before the batch went out.
            start_ns: the server's clock when the device began the layer.
            end_ns: the server's clock when the layer was finished.
            arrival_ns: our clock when it was here.
        """
        self._offset_ns = min(max(self._offset_ns, end_ns - arrival_ns), start_ns - sent_ns)

    def ours(self, server_ns: int) -> int:
        """A time of the server's clock on ours."""
        return server_ns - self._offset_ns

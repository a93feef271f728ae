"""The HTTP side: pages over telemetry snapshots, and the server that answers them."""

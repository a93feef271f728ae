"""The gRPC service: from messages to sessions on one device and back. Knows no concrete backend.

`servicer` answers the calls and `forward` the stream of one session; `sessions` holds what is compiled,
`worker` shares the device's time, `intake` and `quotas` bound what a client may bring, `interceptors` and
`admission` let it in.
"""

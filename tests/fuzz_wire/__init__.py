"""Hostile clients against a real server, beside a well-behaved one whose every bit is checked.

`python -m tests.fuzz_wire --minutes N --seed S [--clients K]`. The random streams of the hostile clients are
those of the seed; how they interleave is the machine's. Only loopback addresses are used, and the load is a
polite one: the well-behaved client must live beside it on two cores.
"""

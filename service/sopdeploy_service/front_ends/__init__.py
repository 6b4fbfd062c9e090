"""Several processes behind one port: one per device, or front ends with an inference process per device.

`front_ends` above 1 starts, for each device, an *inference process*, which owns the runtimes, and several
*front ends*, which handle HTTP, limits, decoding and responses. The supervisor starts, connects and restarts
them.
"""

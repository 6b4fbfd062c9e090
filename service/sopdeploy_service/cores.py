"""How many cores a server may use, and how many threads decode images on them."""

from pathlib import Path

from sopdeploy.environment import usable_cores

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: microseconds per period
DECODERS_BESIDE_CPU_INFERENCE = 2
MAX_DECODERS = 8  # of one process; more would wait for Python's interpreter lock
LARGEST_DECODE_BATCH = 16  # JPEGs that a GPU decodes at once; a H100 has seven units for it


def cores_within_quota() -> int:
    """Count the usable cores, at most the CPU time of the container's quota."""
    try:
        most, period = CPU_QUOTA.read_text().split()
        return min(usable_cores(), max(1, int(most) // int(period)))
    except (OSError, ValueError):  # no cgroup, or no quota: `max 100000`
        return usable_cores()


def decoders_per_process(cores: int, processes: int) -> int:
    """Return the decoding threads of each of *processes* that share *cores* with no other work."""
    return max(DECODERS_BESIDE_CPU_INFERENCE, min(MAX_DECODERS, cores // processes))

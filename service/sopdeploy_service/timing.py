"""Where the time of one request went, for its `Server-Timing` header."""


class Stages:
    """Seconds by stage; of several images in one request the slowest counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def note(self, stage: str, seconds: float) -> None:
        """Keep *seconds* for *stage* unless another image of the request took longer."""
        self.seconds[stage] = max(seconds, self.seconds.get(stage, 0.0))

    def header(self) -> str:
        """Return the header's value; durations in milliseconds, as the standard has it."""
        return ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in self.seconds.items())

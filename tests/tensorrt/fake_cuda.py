"""`cuda.bindings.runtime` simulated in the memory of this process; tracks unreleased resources."""

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

OK = type("Status", (int,), {"name": "cudaSuccess"})(0)
FAILED = type("Status", (int,), {"name": "cudaErrorInsufficientDriver"})(35)


@dataclass
class Mark:
    """A position on a stream."""

    stream: int
    reached: bool = False


class FakeCuda(ModuleType):
    """One GPU, or none; work runs only when a caller waits for it."""

    cudaStreamNonBlocking = 1
    cudaEventBlockingSync, cudaEventDisableTiming = 1, 2
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.gpus: int | None = 1
        self.gpu_name, self.sm = "Fake H200", (9, 0)
        self.held: dict[int, Any] = {}
        self.numbers = itertools.count(1)
        self.streams: dict[int, list[Callable[[], Any]]] = {}  # pending work
        self.events: dict[int, Mark] = {}
        self.broken: set[str] = set()  # functions that fail

    def cudaGetDeviceCount(self) -> Any:
        return (FAILED, None) if not self.gpus else (OK, self.gpus)

    def cudaGetDeviceProperties(self, device: int) -> Any:
        name = self.gpu_name.encode() + b"\0\0"
        return OK, SimpleNamespace(
            name=name, major=self.sm[0], minor=self.sm[1], totalGlobalMem=2**30
        )

    def cudaMalloc(self, size: int) -> Any:
        if "cudaMalloc" in self.broken:
            return FAILED, None
        buffer = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self.cudaMalloc(size)

    def cudaFree(self, address: int) -> Any:
        assert not any(self.streams.values()), (
            "memory is given back while something is on its way"
        )
        del self.held[address]
        return (OK,)

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        number = 77 + next(self.numbers)
        self.streams[number] = []
        return OK, number

    def cudaStreamDestroy(self, stream: int) -> Any:
        del self.streams[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        while self.streams[stream]:
            self.streams[stream].pop(0)()
        return (OK,)

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        assert flags == self.cudaEventBlockingSync | self.cudaEventDisableTiming
        number = next(self.numbers)
        self.events[number] = Mark(stream=0, reached=True)
        return OK, number

    def cudaEventRecord(self, event: int, stream: int) -> Any:
        mark = self.events[event] = Mark(stream)
        self.put(lambda: setattr(mark, "reached", True), stream)
        return (OK,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> Any:
        mark = self.events[event]
        self.put(lambda: self.drive(mark), stream)
        return (OK,)

    def cudaEventSynchronize(self, event: int) -> Any:
        self.drive(self.events[event])
        return (OK,)

    def cudaEventDestroy(self, event: int) -> Any:
        del self.events[event]
        return (OK,)

    def drive(self, mark: Mark) -> None:
        """Run the work of the stream of *mark* until it is reached."""
        while not mark.reached:
            self.streams[mark.stream].pop(0)()

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: int, stream: int
    ) -> Any:
        self.put(lambda: ctypes.memmove(target, source, size), stream)
        return (OK,)

    def put(self, work: Callable[[], Any], stream: int) -> None:
        """Queue *work* until a caller waits for the stream."""
        self.streams[stream].append(work)

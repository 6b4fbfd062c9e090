"""`cuda.bindings.runtime` over the memory of this process; counts what was not given back."""

import ctypes
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any


class Status(int):
    name = "cudaSuccess"


class Failed(Status):
    name = "cudaErrorInsufficientDriver"


OK, FAILED = Status(0), Failed(35)


class FakeCuda(ModuleType):
    """One GPU, or none."""

    cudaStreamNonBlocking = 1
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(
        self, *, gpus: int | None = 1, name: str = "Fake H200", sm: tuple[int, int] = (9, 0)
    ) -> None:
        super().__init__("cuda.bindings.runtime")
        self.gpus, self.gpu_name, self.sm = gpus, name, sm
        self.held: dict[int, Any] = {}
        self.streams = 0
        self.recording: list[Callable[[], Any]] | None = None  # of the capture under way
        self.graphs: dict[int, list[Callable[[], Any]]] = {}
        self.launched = 0
        self.broken: set[str] = set()  # functions that fail

    def cudaGetDeviceCount(self) -> Any:
        return (FAILED, None) if self.gpus is None else (OK, self.gpus)

    def cudaGetDeviceProperties(self, device: int) -> Any:
        name = self.gpu_name.encode() + b"\0\0"
        return OK, SimpleNamespace(name=name, major=self.sm[0], minor=self.sm[1], totalGlobalMem=2**30)

    def cudaMalloc(self, size: int) -> Any:
        buffer = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        return self.cudaMalloc(size)

    def cudaFree(self, address: int) -> Any:
        del self.held[address]
        return (OK,)

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        self.streams += 1
        return OK, 77

    def cudaStreamDestroy(self, stream: int) -> Any:
        self.streams -= 1
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        assert stream == 77
        assert self.recording is None, "a capture must not be waited for"
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> Any:
        assert stream == 77
        self.put(lambda: ctypes.memmove(target, source, size))
        return (OK,)

    def put(self, work: Callable[[], Any]) -> None:
        """Do *work* now, or keep it for the graph that is being captured."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        assert (stream, mode, self.recording) == (77, 1, None)
        self.recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        taken, self.recording = self.recording, None
        assert taken is not None
        return (FAILED, None) if "cudaStreamEndCapture" in self.broken else (OK, self.keep(taken))

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        if "cudaGraphInstantiate" in self.broken:
            return FAILED, None
        return OK, self.keep(self.graphs[graph])

    def keep(self, graph: list[Callable[[], Any]]) -> int:
        number = max(self.graphs, default=0) + 1
        self.graphs[number] = graph
        return number

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:
        assert stream == 77
        if "cudaGraphLaunch" in self.broken:
            return (FAILED,)
        self.launched += 1
        for work in self.graphs[graph]:
            work()
        return (OK,)

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return (OK,)

    cudaGraphExecDestroy = cudaGraphDestroy

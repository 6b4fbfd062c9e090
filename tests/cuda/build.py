"""Compile the stand-in for CUDA, so that the CUDA provider of ONNX Runtime opens graphs without a GPU.

    python tests/cuda/build.py FOLDER

FOLDER contains the package `onnxruntime-gpu`, FOLDER/headers contains `nvidia-cuda-runtime` and
`nvidia-cuda-crt`. The libraries are written to FOLDER/nvidia, where pip would install NVIDIA's,
and that of the driver to FOLDER/driver. FOLDER/bindings contains `tensorrt-cu13-bindings`, the
Python modules of TensorRT; they get libraries that cannot create anything. Needs gcc and nm.

Loading of the provider, graph optimization, partitioning, memory arena, IO binding and error
messages are real. Kernels compute nothing, and convolutions cannot run, because cuDNN is empty.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
FOLDERS = {"libcuda.so.1": "driver", "libcudnn.so.9": "nvidia/cudnn/lib"}
HANDLE = "int {name}(void **handle) {{ static int object; *handle = &object; return 0; }}"
BODIES = {
    r"cudnnGetVersion": "unsigned long {name}(void) {{ return 92400; }}",
    r"cublasGetMathMode": "int {name}(void *handle, int *mode) {{ return *mode = 0; }}",
    r"cublas(Lt)?Create(_v2)?|cudnnCreate\w*": HANDLE,
    r"cublasGetStatus\w+|cudnnGetErrorString": 'const char *{name}(int status) {{ return "stand-in"; }}',
    r"cudnnGetLastErrorString": "void {name}(char *text, unsigned long size) {{ if (size) *text = 0; }}",
    r"cudnnBackend\w+": "int {name}(void) {{ return 3000; }}",  # CUDNN_STATUS_NOT_SUPPORTED
    # no device: only the runtime is there
    r"cuInit|cuTensorMap\w+": "int {name}(void) {{ return 100; }}",
    r"": "int {name}(void) {{ return 0; }}",
}


def output(*command: str) -> str:
    """Return what *command* prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def stub(name: str) -> str:
    """Return the definition of the function *name* that only reports success."""
    body = next(
        body for pattern, body in BODIES.items() if not pattern or re.fullmatch(pattern, name)
    )
    return body.format(name=name)


def symbols(provider: str) -> dict[str, set[str]]:
    """Return the functions that *provider* takes from each library. It looks those of cuDNN up by name."""
    needed: dict[str, set[str]] = {
        "libcudart.so.13": set(),
        "libcublas.so.13": set(),
        "libcublasLt.so.13": set(),
    }
    for line in output("nm", "-D", "--undefined-only", provider).splitlines():
        name, _, library = line.split()[-1].partition("@")
        if library in needed:
            needed[library].add(name)
    names = set(re.findall(r"\bcudnn[A-Z]\w+", output("strings", "-n", "8", provider)))
    return needed | {
        "libcurand.so.10": set(),
        "libcuda.so.1": {"cuInit", "cuTensorMapEncodeTiled"},
        "libcudnn.so.9": {name for name in names if not name.endswith("_t")},
    }


def build(folder: Path) -> None:
    """Compile one library for each that the provider in *folder* needs."""
    written = (HERE / "cudart.c").read_text(encoding="utf-8")
    sources = folder / "sources"
    headers = folder / "headers" / "nvidia" / "cu13" / "include"
    sources.mkdir(exist_ok=True)
    for library, names in symbols(str(folder / PROVIDER)).items():
        runtime = library.startswith("libcudart")
        missing = sorted(
            name for name in names if not (runtime and re.search(rf"\b{name}\(", written))
        )
        files = [sources / f"{library}.c", *([HERE / "cudart.c"] if runtime else [])]
        files[0].write_text("\n".join(map(stub, missing)), encoding="utf-8")
        versions = sources / f"{library}.map"
        versions.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        target = folder / FOLDERS.get(library, "nvidia/cu13/lib")
        target.mkdir(parents=True, exist_ok=True)
        options = [f"-I{headers}", f"-Wl,--version-script={versions}", *map(str, files)]
        compile_library(target / library, *options)


def compile_library(path: Path, *options: str) -> None:
    """Compile a library with gcc and *options*."""
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-w",
        f"-Wl,-soname,{path.name}",
        "-o",
        str(path),
        *options,
    ]
    subprocess.run(command, check=True)


def build_tensorrt(folder: Path) -> None:
    """Compile libraries for the Python modules of TensorRT in *folder*, and write the package `tensorrt`."""
    undefined = output(
        "nm", "-D", "--undefined-only", str(folder / "tensorrt_bindings" / "tensorrt.so")
    )
    source = folder / "stubs.c"
    names = re.findall(
        r"\b(?:create|get|init)\w+(?:_INTERNAL|Registry|Version|Plugins)\b", undefined
    )
    source.write_text("\n".join(map(stub, names)), encoding="utf-8")
    compile_library(folder / "libnvinfer.so.11", str(source))
    for library in ("libnvinfer_plugin.so.11", "libnvonnxparser.so.11"):
        compile_library(folder / library)
    (folder / "tensorrt").mkdir(exist_ok=True)
    text = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    (folder / "tensorrt" / "__init__.py").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    build_tensorrt(Path(sys.argv[1], "bindings"))

"""First contact with a GPU: check and measure exported bundles on it, in parts.

    python first_contact.py FOLDER [PART ...] [--out OUT] [--resume] [--provider cpu]

FOLDER is what `gpu_bundles.py` writes: bundles, JPEGs, and copies of this file and load.py. The parts
`machine`, `probes` and `speed` need ONNX Runtime with CUDA, `server` and `tensorrt` also this project. Each
part runs in its own process and writes each row to OUT/PART.jsonl at once: a part that fails or is killed
keeps its rows and does not prevent the others. --resume skips parts that succeeded. OUT/gpu.md lists all
results. The exit code is 1 if a part failed. `--provider cpu` runs the same on a machine without a GPU.
"""

import argparse
import ctypes
import importlib.metadata
import json
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 32, 64)
WARM_UPS, RUNS, SECONDS = 3, 50, 3.0  # of each size: at most so many batches, in about so many seconds
PART_SECONDS = 300
CONNECTIONS = (1, 64)
PACKAGES = ("numpy", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-cu13", "torch", "sopdeploy")
Row = dict[str, Any]


def machine(bundles: list[Path], provider: str) -> Iterator[Row]:
    """Device, driver and versions."""
    yield {"what": "system", "value": f"{platform.platform()}, Python {platform.python_version()}"}
    driver = Path("/proc/driver/nvidia/version")
    version = re.search(r"\b\d+\.\d+[.\d]*", driver.read_text()) if driver.is_file() else None
    yield {"what": "driver", "value": version[0] if version else "none; CUDA 13 needs 580 or later"}
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    yield from ({"what": name, "value": installed.get(name, "not installed")} for name in PACKAGES)
    yield {"what": "bundles", "value": ", ".join(map(name_of, bundles))}
    if provider == "cuda":
        cuda, name, capability = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(100), []
        if code := cuda.cuInit(0):
            raise RuntimeError(f"cuInit fails with {code}: no usable GPU")
        cuda.cuDeviceGetName(name, 100, 0)
        for attribute in (75, 76):  # major and minor compute capability
            cuda.cuDeviceGetAttribute(ctypes.byref(value := ctypes.c_int()), attribute, 0)
            capability.append(str(value.value))
        yield {"what": "device", "value": f"{name.value.decode()}, sm {'.'.join(capability)}"}


def probes(bundles: list[Path], provider: str) -> Iterator[Row]:
    """Deviation from the probes in noise floors; operators on the CPU; copies to or from the GPU per run."""
    import numpy as np  # noqa: PLC0415  a missing package is one line of this part

    failed = []
    for bundle in bundles:
        row: Row = {"bundle": name_of(bundle)}
        try:
            with tempfile.TemporaryDirectory() as folder:
                session = open_session(bundle, provider, profile=f"{folder}/profile")
                on_cpu: Counter[str] = Counter()
                for part in session.get_provider_graph_assignment_info():
                    on_cpu.update(n.op_type for n in part.get_nodes() if part.ep_name.startswith("CPU"))
                row["on the CPU"] = ", ".join(f"{count} {name}" for name, count in on_cpu.items()) or "none"
                with np.load(bundle / "probes.npz") as arrays:
                    images, expected = arrays["images"], arrays["output_logits"]
                    limit = float(arrays["tolerance_logits"])
                parity = json.loads((bundle / "parity.json").read_text(encoding="utf-8"))
                floor = parity["outputs"]["logits"]["noise_floor"]
                for size in (1, len(images)):
                    parts = [images[start : start + size] for start in range(0, len(images), size)]
                    values = [session.run(["logits"], {session.get_inputs()[0].name: part}) for part in parts]
                    deviation = np.abs(np.concatenate([value for (value,) in values]) - expected).max()
                    row[f"in batches of {size}"] = f"{deviation / floor:.2f} of {limit / floor:.1f}"
                    failed += [] if deviation <= limit else [row["bundle"]]
                events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
                copies = sum(
                    event.get("args", {}).get("op_name", "").startswith("Memcpy") for event in events
                )
                row["copies"] = round(copies / (len(images) + 1), 1)
        except Exception as error:  # the next bundle may run; the libraries' errors share no base class
            failed.append(row["bundle"])
            row["error"] = one_line(error)
        yield row
    if failed:
        raise RuntimeError(f"wrong or not run: {', '.join(dict.fromkeys(failed))}")


def speed(bundles: list[Path], provider: str) -> Iterator[Row]:
    """Median milliseconds of a batch with its copies, images/s alone and with two in flight; MiB used."""
    for bundle in bundles:
        before, session = free_memory(), open_session(bundle, provider)
        for batch in (size for size in BATCHES if size <= manifest_of(bundle)["batch"]["maximum"]):
            calls = [bind(session, bundle, batch, provider) for _ in range(2)]
            alone, two = median_ms(calls[:1]), median_ms(calls)
            row = {"bundle": name_of(bundle), "batch": batch, "ms": f"{alone:.3f}"}
            row |= {"images/s": f"{1e3 * batch / alone:.0f}", "two in flight": f"{2e3 * batch / two:.0f}"}
            yield row | {"MiB": (before - free_memory()) >> 20}
        del session, calls
        yield {"bundle": name_of(bundle), "batch": "closed", "MiB": (before - free_memory()) >> 20}


def server(bundles: list[Path], provider: str) -> Iterator[Row]:
    """`sopdeploy serve` under load: JPEGs of 500 x 375 pixels; client and server share the cores."""
    yield from serve(bundles[-1], "onnxruntime-cuda" if provider == "cuda" else "onnxruntime-cpu")


def tensorrt(bundles: list[Path], _: str) -> Iterator[Row]:
    """Engines: parsed, built, compared with the probes, and the server on them under the same load."""
    for bundle in bundles:
        command = [sys.executable, "-m", "sopdeploy", "engine", str(bundle), "--profiles", "1,8,64"]
        begin = time.monotonic()
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise RuntimeError((built.stderr.strip().splitlines() or ["no message"])[-1])
        yield {"bundle": name_of(bundle), "build": f"{time.monotonic() - begin:.0f} s"}
        yield from serve(bundle, "tensorrt")


PARTS: dict[str, Callable[[list[Path], str], Iterator[Row]]] = {
    part.__name__: part for part in (machine, probes, speed, server, tensorrt)
}


def open_session(bundle: Path, provider: str, profile: str = "") -> Any:
    """Open the graph of *bundle* with the options of the service; write a profile to the path *profile*."""
    import onnxruntime as ort  # noqa: PLC0415

    options, path = ort.SessionOptions(), str(bundle / "model.onnx")
    options.log_severity_level, options.enable_profiling = 4, bool(profile)
    if profile:
        options.profile_file_prefix = profile
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider == "cpu":
        return ort.InferenceSession(path, options, ["CPUExecutionProvider"])
    ort.preload_dlls()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    chosen = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    chosen |= {"prefer_nhwc": "1"} if manifest_of(bundle)["precision"] == "fp16" else {}
    session = ort.InferenceSession(path, options, [("CUDAExecutionProvider", chosen)], enable_fallback=0)
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError(f"ONNX Runtime runs on {session.get_providers()[0]}")
    return session


def bind(session: Any, bundle: Path, batch: int, provider: str) -> Callable[[], Any]:
    """Bind a batch of images (batch, H, W, 3) on the device; return what uploads, runs and downloads it."""
    import numpy as np  # noqa: PLC0415
    import onnxruntime as ort  # noqa: PLC0415

    shape = (batch, *manifest_of(bundle)["inputs"][0]["shape"][1:])
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    binding, tensor = session.io_binding(), ort.OrtValue.ortvalue_from_numpy(images, provider, 0)
    binding.bind_ortvalue_input(session.get_inputs()[0].name, tensor)
    for output in session.get_outputs():
        binding.bind_output(output.name, provider, 0)

    def call() -> Any:
        tensor.update_inplace(images)
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()

    return call


def median_ms(calls: list[Callable[[], Any]]) -> float:
    """Time all *calls* at once, again and again."""
    times: list[float] = []
    with ThreadPoolExecutor(len(calls)) as pool:
        end = time.perf_counter() + SECONDS
        while len(times) < WARM_UPS + RUNS and (len(times) <= WARM_UPS or time.perf_counter() < end):
            begin = time.perf_counter()
            for future in [pool.submit(call) for call in calls]:
                future.result()
            times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[WARM_UPS:])


def free_memory() -> int:
    """Return the free bytes of the GPU; 0 without CUDA."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        ctypes.CDLL("libcudart.so.13").cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    except OSError:
        return 0
    return free.value


def serve(bundle: Path, runtime: str) -> Iterator[Row]:
    """Serve *bundle* on *runtime* and measure the load that load.py puts on it."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = str(unused.getsockname()[1])
    command = [sys.executable, "-m", "sopdeploy", "serve", str(bundle), "--port", port]
    process = subprocess.Popen([*command, "--setting", f"runtime={runtime}"], stdout=sys.stderr)
    url, images = f"http://127.0.0.1:{port}", Path(sys.argv[1], "images")
    try:
        while not is_ready(f"{url}/readyz"):
            if process.poll() is not None:
                raise RuntimeError(f"sopdeploy serve ends with exit code {process.returncode}")
            time.sleep(0.2)
        for connections in CONNECTIONS:
            load = [
                sys.executable,
                str(Path(__file__).with_name("load.py")),
                f"{url}/v1/classify",
                str(images),
            ]
            load += ["--connections", str(connections)]
            measured = json.loads(subprocess.run(load, capture_output=True, check=True).stdout)
            row = {"bundle": name_of(bundle), "runtime": runtime, "connections": connections}
            yield row | {key: round(measured[key], 1) for key in ("images_per_s", "p50_ms", "p99_ms")}
    finally:
        process.terminate()
        process.wait(30)


def is_ready(url: str) -> bool:
    """Return whether *url* answers with success."""
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310  loopback
    except OSError:
        return False
    return True


def manifest_of(bundle: Path) -> Any:
    """Read the manifest of *bundle*."""
    return json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))


def name_of(bundle: Path) -> str:
    """Return the network and the precision of *bundle*."""
    return "{model} {precision}".format_map(manifest_of(bundle))


def one_line(error: Exception) -> str:
    """Convert *error* to one line without the cells' separator."""
    return " ".join(f"{type(error).__name__}: {error}".replace("|", "/").split())[:300]


def run_part(part: str, options: argparse.Namespace) -> None:
    """Run *part* in its own process, because an error of CUDA ends all CUDA work of a process."""
    path, begin = options.out / f"{part}.jsonl", time.monotonic()
    command = [sys.executable, __file__, str(options.folder), part, "--provider", options.provider, "--alone"]
    with path.open("w", encoding="utf-8") as rows, path.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(command, stdout=rows, stderr=log)
        try:
            result = "ok" if process.wait(PART_SECONDS) == 0 else ""
        except subprocess.TimeoutExpired:
            result = f"stopped after {PART_SECONDS} s"
        finally:
            process.kill()
        log.seek(0)
        result = (
            result or f"failed: {(log.read().strip().splitlines() or [f'exit {process.returncode}'])[-1]}"
        )
        seconds, date = round(time.monotonic() - begin, 1), datetime.now(UTC).date().isoformat()
        rows.write(json.dumps({"result": result, "seconds": seconds, "date": date}) + "\n")
    print(f"{part}: {result} ({seconds} s)", flush=True)


def rows_of(path: Path) -> list[Row]:
    """Read the rows of a part and its result; without a result, the part was killed or did not run."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    return rows if rows and "result" in rows[-1] else [*rows, {"result": "not finished"}]


def page(out: Path) -> str:
    """Build the page of results: a table for each part."""
    lines = ["# On a GPU", "", "This page shows what `make gpu-check` checked and measured.", ""]
    for name, part in PARTS.items():
        *rows, last = rows_of(out / f"{name}.jsonl")
        lines += [f"## {name}", "", f"{part.__doc__} {last.get('date', '')} {last['result']}", ""]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)] if rows else []
        lines += [f"| {' | '.join(str(row.get(key, '')) for key in columns)} |" for row in rows] + [""]
    return "\n".join(lines)


def main() -> int:
    """Run the parts; with the internal option --alone, one part in this process. Return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("first-contact"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    bundles = [
        path.parent for path in options.folder.glob("*/*/manifest.json") if not path.parent.is_symlink()
    ]
    bundles.sort(key=lambda bundle: (bundle / "model.onnx").stat().st_size)
    if not bundles:
        parser.error(f"{options.folder} has no bundle; `make gpu-bundles` writes them")
    if options.alone:
        try:
            for row in PARTS[options.parts[0]](bundles, options.provider):
                print(json.dumps(row), flush=True)
        except Exception as error:  # any error is the result of this part
            sys.exit(one_line(error))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    parts = options.parts or [*PARTS]
    for part in parts:
        if not (options.resume and rows_of(options.out / f"{part}.jsonl")[-1]["result"] == "ok"):
            run_part(part, options)
        (options.out / "gpu.md").write_text(page(options.out), encoding="utf-8")
    return int(any(rows_of(options.out / f"{part}.jsonl")[-1]["result"] != "ok" for part in parts))


if __name__ == "__main__":
    sys.exit(main())

"""First contact with a GPU: check and measure exported bundles on it, in parts.

    python first_contact.py FOLDER [PART ...] [--out OUT] [--minutes 15] [--resume] [--provider
    cpu]

FOLDER is what `gpu_bundles.py` writes. The parts `machine`, `outputs` and `speed` need ONNX
Runtime with CUDA, `server` and `tensorrt` also this project. The most important part runs
first, each in its own process, which writes each row at once to OUT/PART.jsonl; OUT/gpu.md
lists all. No part runs longer than `PART_SECONDS`, or after --minutes. --resume skips parts
that succeeded. `--provider cpu` needs no GPU.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from load import put_loads, serving

BATCHES = "1,8,32,64"
WARM_UPS, SECONDS = 3, 2.0  # for each batch size
PART_SECONDS = 300
SERVED = "resnet50 fp16"  # the bundle of the part `server`; another folder's last one
FRONT_ENDS = ("auto", "4", "0")
PACKAGES = (
    "numpy",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-cu13",
    "torch",
    "sopdeploy",
)
CUDART = "libcudart.so.13"
Bundle = dict[str, Any]  # its manifest, path, and name with the precision
Row = dict[str, Any]


def machine(_: Bundle, provider: str) -> Iterator[Row]:
    """Date, versions and device."""
    found = {"date": time.strftime("%Y-%m-%d"), "system": platform.platform()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    yield from ({"what": name, "value": value} for name, value in found.items())
    if provider == "cuda":
        query = [
            "nvidia-smi",
            "--query-gpu=name,compute_cap,driver_version",
            "--format=csv,noheader",
        ]
        yield {
            "what": "GPU, sm, driver",
            "value": subprocess.check_output(query, text=True).strip(),
        }


def outputs(bundle: Bundle, provider: str) -> Iterator[Row]:
    """Numerical error of reference outputs, in rounding errors; operators on the CPU; copies to and from it."""
    import numpy as np  # noqa: PLC0415  a missing package is one line of this part

    arrays = np.load(bundle["path"] / "probes.npz")
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(bundle, provider, profile=f"{folder}/profile")
        (logits,) = session.run(["logits"], {session.get_inputs()[0].name: arrays["images"]})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    deviation, limit = (
        np.abs(logits - arrays["output_logits"]).max(),
        float(arrays["tolerance_logits"]),
    )
    floor = json.loads((bundle["path"] / "parity.json").read_text())["outputs"]["logits"][
        "noise_floor"
    ]
    on_cpu: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        on_cpu.update(
            node.op_type for node in part.get_nodes() if part.ep_name.startswith("CPU")
        )
    row = {
        "bundle": bundle["name"],
        "numerical error": f"{deviation / floor:.2f} of {limit / floor:.1f}",
    }
    copies = sum("Memcpy" in event.get("args", {}).get("op_name", "") for event in events)
    yield row | {"on the CPU": str(dict(on_cpu)), "copies": copies}
    if not deviation <= limit:
        raise RuntimeError("the outputs are wrong")


def speed(bundle: Bundle, provider: str) -> Iterator[Row]:
    """Median milliseconds of a batch with its copies, images/s alone and with two in flight; MiB in use.

    One session runs all sizes; the service has one for each size of a network with
    convolutions.
    """
    session = open_session(bundle, provider)
    for batch in map(int, BATCHES.split(",")):
        calls = [bind(session, bundle, batch, provider) for _ in range(2)]
        alone, two = median_ms(calls[:1]), median_ms(calls)
        row = {"bundle": bundle["name"], "batch": batch, "ms": f"{alone:.3f}"}
        row |= {
            "images/s": f"{1e3 * batch / alone:.0f}",
            "two in flight": f"{2e3 * batch / two:.0f}",
        }
        yield row | ({"MiB": used_mib()} if provider == "cuda" else {})


def server(bundle: Bundle, provider: str) -> Iterator[Row]:
    """`sopdeploy serve` with 64 connections; client and server share the cores.

    `images` are JPEGs of 500 x 375 pixels, `phone` of 4000 x 3000.
    """
    runtime, folder = f"onnxruntime-{provider}", bundle["path"].parents[1]
    for front_ends in FRONT_ENDS:
        with serving(
            str(bundle["path"]), "--runtime", runtime, "--set", f"front_ends={front_ends}"
        ) as (
            _,
            url,
        ):
            for images in ("images", "phone"):
                load = put_loads(f"{url}/v1/classify", folder / images, 6, 64)
                row = {
                    "bundle": bundle["name"],
                    "front ends": front_ends,
                    "photographs": images,
                    "client": load.client,
                }
                yield row | {
                    key: f"{getattr(load, key):.1f}"
                    for key in ("images_per_s", "p50_ms", "p99_ms")
                }


def tensorrt(bundle: Bundle, _: str) -> Iterator[Row]:
    """Engines that reproduce the reference outputs: seconds to build, median milliseconds of a batch."""
    from sopdeploy.bundle.folder import open_bundle  # noqa: PLC0415
    from sopdeploy_commands.bench import bench  # noqa: PLC0415
    from sopdeploy_commands.engine_builder.engine import get_engine  # noqa: PLC0415
    from sopdeploy_export.options import EngineOptions  # noqa: PLC0415
    from sopdeploy_service.settings import load_settings  # noqa: PLC0415

    engine = get_engine(open_bundle(bundle["path"]), EngineOptions(profiles="1,8,64"))
    yield {"bundle": bundle["name"], "build": f"{engine.record.build_seconds:.0f} s"}
    for each in bench(
        bundle["path"], batch=BATCHES, settings=load_settings(runtime="tensorrt")
    ).latencies:
        yield {"bundle": bundle["name"], "batch": each.batch, "ms": f"{each.median_ms:.3f}"}


# The most important part first, because time on a GPU is short.
PARTS = {part.__name__: part for part in (machine, server, outputs, tensorrt, speed)}


def open_session(bundle: Bundle, provider: str, profile: str = "") -> Any:
    """Open the graph of *bundle* with the options of the service; write a profile to the path *profile*.

    Unlike the service, it opens every graph in fp16 in NHWC, also that of a transformer.
    """
    import onnxruntime as ort  # noqa: PLC0415

    options, path = ort.SessionOptions(), str(bundle["path"] / "model.onnx")
    options.log_severity_level = 4
    options.enable_profiling, options.profile_file_prefix = bool(profile), profile
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider == "cpu":
        options.add_session_config_entry("session.x64quantprecision", "1")
        return ort.InferenceSession(path, options, ["CPUExecutionProvider"])
    for entry in (
        sys.path
    ):  # also those of an outer Python, which `ort.preload_dlls()` does not look for
        for folder in sorted(Path(entry, "nvidia").glob("*/lib")):
            ort.preload_dlls(directory=str(folder))
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    chosen = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    chosen |= {"prefer_nhwc": "1"} if bundle["precision"] == "fp16" else {}
    session = ort.InferenceSession(
        path, options, [("CUDAExecutionProvider", chosen)], enable_fallback=0
    )
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError(
            f"ONNX Runtime runs on {session.get_providers()[0]}; the .log says why"
        )
    return session


def bind(session: Any, bundle: Bundle, batch: int, provider: str) -> Callable[[], Any]:
    """Bind a batch of images (batch, H, W, 3); return what uploads, runs and downloads it."""
    import numpy as np  # noqa: PLC0415
    import onnxruntime as ort  # noqa: PLC0415

    images = np.random.default_rng(0).integers(
        0, 256, (batch, *bundle["inputs"][0]["shape"][1:]), np.uint8
    )
    binding = session.io_binding()
    tensor = ort.OrtValue.ortvalue_from_numpy(images, provider, 0)
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
        while len(times) <= WARM_UPS or time.perf_counter() < end:
            begin = time.perf_counter()
            list(pool.map(lambda call: call(), calls))
            times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times[WARM_UPS:])


def used_mib() -> int:
    """Return the memory of the GPU that is in use; a session has loaded the library."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    ctypes.CDLL(CUDART).cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return (total.value - free.value) >> 20


def read_bundles(folder: Path) -> list[Bundle]:
    """Read the manifests of the bundles in *folder*, the one with the smallest graph first."""
    found: list[Bundle] = []
    for path in {
        path.resolve() for path in folder.glob("*/*/manifest.json")
    }:  # `latest` is a link
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found.append(
            manifest | {"path": path.parent, "name": "{model} {precision}".format_map(manifest)}
        )
    return sorted(found, key=lambda bundle: (bundle["path"] / "model.onnx").stat().st_size)


def run_alone(part: str, bundles: list[Bundle], provider: str) -> None:
    """Run *part* in this process; print its rows and its result."""
    begin, result = time.monotonic(), "ok"
    served = [bundle for bundle in bundles if bundle["name"] == SERVED] or bundles[-1:]
    for bundle in served if part in {"machine", "server"} else bundles:
        try:
            for row in PARTS[part](bundle, provider):
                print(json.dumps(row), flush=True)
        except (
            Exception
        ) as error:  # the next bundle may run; the libraries' errors share no base class
            line = " ".join(f"{type(error).__name__}: {error}".replace("|", "/").split())[:1000]
            result = f"failed: {bundle['name']}: {line}"
            print(json.dumps({"bundle": bundle["name"], "error": line}), flush=True)
    print(json.dumps({"result": f"{result} ({time.monotonic() - begin:.1f} s)"}), flush=True)


def run_part(part: str, options: argparse.Namespace, seconds: float) -> None:
    """Run *part* for at most *seconds*, in its own process: an error of CUDA ends all CUDA work of one."""
    path = options.out / f"{part}.jsonl"
    path.unlink(missing_ok=True)  # a process that was left behind may still write to it
    command = [
        sys.executable,
        __file__,
        options.folder,
        part,
        "--provider",
        options.provider,
        "--alone",
    ]
    with path.open("a") as rows, path.with_suffix(".log").open("w") as log:
        with subprocess.Popen(
            command, stdout=rows, stderr=log, start_new_session=True
        ) as process:
            try:
                end = f"failed: exit code {process.wait(seconds)}, see {log.name}"
            except subprocess.TimeoutExpired:
                end = f"failed: stopped after {seconds:.0f} s"
                os.killpg(process.pid, signal.SIGKILL)  # also the server that it started
        if not read_part(options.out, part)[1]:
            print(json.dumps({"result": end}), file=rows, flush=True)
    print(f"{part}: {read_part(options.out, part)[1]}", flush=True)


def read_part(out: Path, part: str) -> tuple[list[Row], str]:
    """Read the rows of a part and its result, which is empty if the part was killed or did not run."""
    path = out / f"{part}.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    return (rows[:-1], rows[-1]["result"]) if rows and "result" in rows[-1] else (rows, "")


def page(out: Path) -> str:
    """Build the page of results: a table for each part."""
    lines = [
        "# On a GPU",
        "",
        "This page shows what `make gpu-check` checked and measured.",
        "",
    ]
    for name, part in PARTS.items():
        rows, result = read_part(out, name)
        lines += [
            f"## {name}",
            "",
            f"{' '.join(str(part.__doc__).split())} {result or 'not finished'}",
            "",
        ]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)] if rows else []
        lines += [
            f"| {' | '.join(str(row.get(key, '')) for key in columns)} |" for row in rows
        ] + [""]
    return "\n".join(lines)


def main() -> int:
    """Run the parts; with the internal option --alone, one part in this process. Return the exit code."""
    parser = argparse.ArgumentParser(
        description="Check and measure a GPU with exported bundles."
    )
    parser.add_argument("folder", type=Path, help="what gpu_bundles.py wrote")
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--out", type=Path, default=Path("first-contact"))
    parser.add_argument("--minutes", type=float, default=15.0, help="for all parts (15)")
    parser.add_argument("--resume", action="store_true", help="skip the parts that succeeded")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if not (bundles := read_bundles(options.folder)):
        parser.error(f"{options.folder} has no bundle; `make gpu-bundles` writes them")
    if options.alone:
        run_alone(options.parts[0], bundles, options.provider)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    parts = options.parts or [*PARTS]
    end = time.monotonic() + 60 * options.minutes
    for part in parts:
        if not (options.resume and read_part(options.out, part)[1].startswith("ok")):
            run_part(part, options, max(0.0, min(PART_SECONDS, end - time.monotonic())))
        (options.out / "gpu.md").write_text(page(options.out), encoding="utf-8")
    return int(not all(read_part(options.out, part)[1].startswith("ok") for part in parts))


if __name__ == "__main__":
    sys.exit(main())

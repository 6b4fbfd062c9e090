"""What processes have that a template forks; without arguments, the side of the supervisor."""

import asyncio
import errno
import importlib
import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from sopdeploy.bundle.sealed import create_memory
from sopdeploy_service.devices import control, template
from sopdeploy_service.devices.processes import Child, LaunchConfig
from sopdeploy_service.settings import Settings

RUNTIMES = {"onnxruntime", "openvino", "tensorrt", "torch"}


def launched() -> int:
    """Tell what this process has; end with 3 when the other end of its control socket is closed."""
    with socket.socket(fileno=template.wait_for_launch().control) as end:
        end.setblocking(True)
        facts = {
            "name": Path("/proc/self/comm").read_text().strip(),
            "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
            "is_child": os.getppid() == int(os.environ["SUPERVISOR"]),
            "sockets": num_sockets(),
            "threads": len(list(Path("/proc/self/task").iterdir())),
            "runtimes": sorted(RUNTIMES & set(sys.modules)),
            "is_imported": template.MODULE in sys.modules,
        }
        end.send(json.dumps(facts).encode())
        end.recv(1)

    return 3


def num_sockets() -> int:
    count = 0
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the folder
            count += str(file.readlink()).startswith("socket:")
    return count


async def start(of: template.ServerTemplate) -> tuple[Child, socket.socket, dict[str, object]]:
    ours, theirs = control.socket_pair()
    shared = create_memory("x", 8)
    with theirs:
        config = LaunchConfig(
            name="front-0", device=None, variables={"CUDA_VISIBLE_DEVICES": "7"}, sources=(),
            settings=Settings(), supervisor=os.getpid(), front_ends=1, position=0, num_servers=1, device_processes=(),
        )  # fmt: skip
        child = await of.start(config, theirs.fileno(), shared, shared, shared)
    os.close(shared)
    return child, ours, json.loads(await asyncio.get_running_loop().sock_recv(ours, 10_000))


async def code_of(child: Child) -> int:
    while (code := child.poll()) is None:
        await asyncio.sleep(0.01)
    return code


async def supervise() -> dict[str, object]:
    found: dict[str, object] = {}
    used = template.ServerTemplate()
    first, end, found["facts"] = await start(used)
    killed = used._process.pid
    os.environ["LIGHT"] = "1"
    used._process.kill()
    used._process.wait()
    child, other, _ = await start(used)
    child.kill()
    other.close()
    found["code after the end of the template"] = await code_of(child)
    found["is replaced"] = used._process.pid != killed
    found["still runs"] = first.poll() is None
    end.close()
    found["code"] = await code_of(first)
    used.close()
    found["error without a subreaper"] = await error_of(used, SET_SUBREAPER=-1)
    found["error without a template"] = await error_of(
        used, MODULE="tests.service.devices.launched_nowhere"
    )
    return found


async def error_of(used: template.ServerTemplate, **changed: object) -> str:
    template.LIBC.prctl(template.SET_SUBREAPER, 0)
    vars(template).update(changed)
    try:
        await start(used)
    except OSError as error:
        return errno.errorcode[error.errno]
    finally:
        used.close()
    return ""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        if "LIGHT" not in os.environ:
            importlib.import_module(template.MODULE)
        sys.exit(launched())
    template.MODULE = "tests.service.devices.launched"
    os.environ["SUPERVISOR"] = str(os.getpid())
    sys.stdout.write(json.dumps(asyncio.run(supervise())))

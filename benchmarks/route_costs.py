"""How long `/livez` takes beside 50 connections on any route, compared with 50 connections on `/livez`.

    python benchmarks/route_costs.py BUNDLE [--seconds 4] [--front-ends 2]

Each connection sends one request after the other, while `/livez` is asked on new connections. The goal
is at most twice the median beside `/livez`, which is measured before each route again.
"""

import http.client
import statistics
import sys
import threading
import time
from pathlib import Path

from measure import Result, existing, make_parser, one_line_errors, report
from serving_peers import OURS, free_port, started

from sopdeploy_service.app import ROUTERS

CONNECTIONS, PROBE_SECONDS = 50, 0.02
GOAL = 2.0


def paths(port: int) -> list[str]:
    """List the paths of all routes that read no image, with the names of the model that is served."""
    given = {"name": model_of(port), "number": 0}
    routes = [
        route for router in ROUTERS for route in router.routes if "GET" in getattr(route, "methods", ())
    ]
    templates = [str(getattr(route, "path", "")) for route in routes]
    return ["/nothing", *(path.format(**given) for path in templates if "{version}" not in path)]


def model_of(port: int) -> str:
    """Return the name of the first model."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/info")
    text = connection.getresponse().read().decode()
    connection.close()
    return text.partition('"name":"')[2].partition('"')[0]


def livez_beside(path: str, port: int, seconds: float) -> list[float]:
    """Ask `/livez` for so many *seconds* beside requests for *path*; return how long each answer took."""
    end = time.monotonic() + seconds

    def flood() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.monotonic() < end:
            connection.request("GET", path)
            connection.getresponse().read()
        connection.close()

    threads = [threading.Thread(target=flood, daemon=True) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    taken: list[float] = []
    while time.monotonic() < end:
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/livez")
        connection.getresponse().read()
        connection.close()
        taken.append(time.monotonic() - began)
        time.sleep(PROBE_SECONDS)
    for thread in threads:
        thread.join()
    return taken


def measure(bundle: Path, seconds: float, front_ends: int) -> list[Result]:
    """Measure all routes of a server of *bundle*."""
    port, results = free_port(), []
    flags = ["--front-ends", str(front_ends), "--devices", "cpu"] if front_ends else []
    serve = [sys.executable, "-m", "sopdeploy", "serve", str(bundle), "--threads", "1", *flags]
    with started([*serve, "--port", str(port)], OURS, port, {}, Path.cwd()):
        for path in paths(port):
            beside_livez, beside = (livez_beside(one, port, seconds) for one in ("/livez", path))
            results.append(
                Result(
                    case=f"beside {CONNECTIONS} on {path}, slowest {1e3 * max(beside):.0f} ms",
                    against=f"{GOAL:.0f} x beside /livez",
                    ours=1e3 * statistics.median(beside),
                    other=GOAL * 1e3 * statistics.median(beside_livez),
                    unit="ms",
                    runs=len(beside),
                )
            )
    return results


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("bundle", type=existing)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    parser.add_argument("--front-ends", type=int, default=2, help="0: one process")
    arguments = parser.parse_args()
    with one_line_errors():
        results = measure(arguments.bundle, arguments.seconds, arguments.front_ends)
        report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()

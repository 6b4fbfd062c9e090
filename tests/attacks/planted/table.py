"""All planted networks, by the kind and the name."""

from tests.attacks.planted import branches, compiled, graphs, images, plain_runs, state, values
from tests.attacks.planted.network import Row

GROUPS: dict[str, dict[str, Row]] = {
    "counter": state.COUNTERS,
    "kept": state.KEPT,
    "written": state.WRITTEN,
    "copy": graphs.COPIES,
    "size": graphs.SIZES,
    "memory": graphs.MEMORY,
    "constant": graphs.CONSTANTS,
    "odd": graphs.ODD,
    "random": graphs.RANDOM,
    "valid": graphs.VALID,
    "plain network": graphs.OTHERS,
    "active": graphs.ACTIVE,
    "images": images.IMAGES,
    "value of a branch": branches.VALUES,
    "alias of a branch": branches.ALIASES,
    "effect of a branch": branches.EFFECTS,
    "branch in Python": branches.PYTHON,
    "branch that nothing needs": branches.RIGHT,
    "asks for a flag": plain_runs.FLAGS,
    "asks what a tensor is": plain_runs.KINDS,
    "asks what runs it": plain_runs.AROUND,
    "reads": plain_runs.READS,
    "writes unseen": plain_runs.WRITES,
    "infinity": values.INFINITIES,
    "compiled": compiled.COMPILED,
    "an image that no export has": plain_runs.UNSEEN,
    "control": plain_runs.PLAIN,
}
TABLE = {f"{kind}: {name}": row for kind, rows in GROUPS.items() for name, row in rows.items()}
# The first row of each kind runs in every run of the tests, the others with `--slow`.
PLAIN = {f"{kind}: {next(iter(rows))}" for kind, rows in GROUPS.items()}

UNLIKE = "code that acts differently only in other cases: for images unlike all of these"

# These pass, and their files differ from them. The page says why, with this sentence.
NOT_SEEN = {f"an image that no export has: {name}": UNLIKE for name in plain_runs.UNSEEN}

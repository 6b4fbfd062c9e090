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
    "control": plain_runs.PLAIN,
}
TABLE = {f"{kind}: {name}": row for kind, rows in GROUPS.items() for name, row in rows.items()}

NOT_CAPTURED = (
    "what the code of the network does only while nothing captures or records it, on images that "
    "no probe resembles"
)

# These pass, and their files differ from them. The page says why, with this sentence.
NOT_SEEN = dict.fromkeys(
    [
        "asks what runs it: a dispatch mode",
        "asks what runs it: the number of dispatch modes",
        "asks what runs it: a function mode",
        "reads: tolist with torch functions disabled",
        "reads: numpy with torch functions disabled",
        "reads: numpy in another thread",
        "compiled: a scripted function that reads a list",
        "writes unseen: another thread",
    ],
    NOT_CAPTURED,
)

"""All planted networks, by the kind and the name."""

from tests.attacks.planted import branches, graphs, plain_runs, state
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
    "images": graphs.IMAGES,
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
    "control": plain_runs.PLAIN,
}
TABLE = {f"{kind}: {name}": row for kind, rows in GROUPS.items() for name, row in rows.items()}

NOT_CAPTURED = (
    "what the code of the network does only while nothing captures it, on images that no probe "
    "resembles"
)

# These pass, and their files differ from them. The page says why, with this sentence.
NOT_SEEN = dict.fromkeys(
    [
        *(
            f"asks for a flag: {name}"
            for name in (
                "torch.compiler.is_exporting",
                "is_exporting, imported by its name",
                "torch.compiler.is_compiling",
                "torch._dynamo.is_compiling",
                "torch._utils.is_compiling",
                "is_fx_tracing",
                "a context of tracing",
                "a fake mode",
                "is_exporting in a layer",
                "is_exporting in a function with a gradient",
                "is_compiling before nonzero",
            )
        ),
        *(
            f"asks what a tensor is: {name}"
            for name in (
                "type",
                "isinstance of FakeTensor",
                "the name of the class",
                "fake_mode",
                "the keys of dispatch",
            )
        ),
        *(f"asks what runs it: {name}" for name in plain_runs.AROUND),
        *(
            f"reads: {name}"
            for name in (
                "a size of nonzero",
                "a size of a mask",
                "a size of unique",
                "the number of where",
                "with torch functions disabled",
                "tolist with torch functions disabled",
                "numpy with torch functions disabled",
                "numpy in another thread",
            )
        ),
        *(f"writes unseen: {name}" for name in ("data", "swap_tensors", "another thread")),
    ],
    NOT_CAPTURED,
)

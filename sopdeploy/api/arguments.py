"""Rewrite error messages for the Python API: they name arguments instead of command-line options.

Messages name options as the command line writes them. The functions of `sopdeploy` raise the same errors
with the names that Python uses: `--max-batch 0` becomes `max_batch=0`. The commands call the functions
without this wrapper.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from sopdeploy.errors import SopdeployError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

SWITCHES = {
    "detach", "allow_constants", "allow_drift", "lowering", "autotune", "measure_speed", "pt2", "with_cam",
    "verbose", "heads", "features",
}  # fmt: skip
OPTIONS = {
    "accepts", "actors", "api_key", "batch", "budget", "calibrate", "calibration", "config", "cpus_per_actor",
    "data", "evaluate", "explain", "gpus_per_actor", "int8_for", "keep_float", "labels", "log", "logits",
    "max_batch", "max_drop", "max_errors", "model", "models", "name", "newton_schulz", "out", "part_images",
    "plain", "pooling", "precision", "preprocess", "probes", "ray", "recipe", "runtime", "top_k",
    "training_only", "tta", "weights", "workers",
}  # fmt: skip
LISTS = {"keep_float", "log", "training_only"}
OTHERS = {"set": "", "resume": 'resume="always"'}  # `--set key=value` is a keyword `key=value`
WORDS = {  # values of options that look like words of the sentence
    "bf16-backbone", "cpu", "entropy", "fp16", "fp32", "flip", "imagenet", "int8", "minmax", "none",
    "percentile", "ten-crop", "tensorboard", "tensorrt", "wandb",
}  # fmt: skip
FLAG = re.compile(r"`?--([a-z][a-z0-9-]*)`?(?: ([^\s,;:()`]+))?")
PLACEHOLDER, LITERAL = re.compile(r"[A-Z]+\Z"), re.compile(r"[\w./~-]*[\d./][\w./~-]*\Z")
COMMAND = re.compile(r"`?sopdeploy [a-z]+[^`;]*")


def name_arguments(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Wrap *function* of the Python API so that its errors name arguments instead of options."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except SopdeployError as error:
            error.args = (rename_options(str(error)), *error.args[1:])
            raise

    return call


def rename_options(message: str) -> str:
    """Replace the options in *message* by arguments, except in command lines of sopdeploy."""
    parts, end = [], 0
    for command in COMMAND.finditer(message):
        parts += [FLAG.sub(_argument, message[end : command.start()]), command.group()]
        end = command.end()
    return "".join([*parts, FLAG.sub(_argument, message[end:])])


def _argument(found: re.Match[str]) -> str:
    """Format one option and its value as a Python argument; unknown options stay as they are."""
    flag, value = found.group(1), found.group(2)
    rest = "" if value is None else f" {value}"
    name = flag.removeprefix("no-").replace("-", "_")
    if flag in OTHERS:
        return (OTHERS[flag] + rest).strip()
    if name in SWITCHES:
        return f"{name}={not flag.startswith('no-')}{rest}"
    if name not in OPTIONS:
        return found.group()
    if value is None:
        return name
    value, stop = value.rstrip("."), "." * value.endswith(".")
    if PLACEHOLDER.match(value):
        return f"{name}={value}{stop}"
    alone = found.string[found.end() :].startswith(":")  # the value in `--tta x: not one of ..`
    if value not in WORDS and not LITERAL.match(value) and not alone:
        return f"{name}{rest}"
    try:
        shown = json.dumps(json.loads(value))
    except ValueError:
        shown = json.dumps(value)
    return f"{name}={f'[{shown}]' if name in LISTS else shown}{stop}"

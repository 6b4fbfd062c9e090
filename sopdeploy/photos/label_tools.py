"""The exports of label tools: files and classes in JSON, in CVAT's XML, and in VIA's CSV.

All readers yield cells by column, `file` and `classes`, for `sopdeploy.photos.cells`. An image
that nobody has labelled yet has no `classes`. A JSON object of a file and its labels
(`read_entry`) must have a key for them, with null if there are none.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from xml.etree import ElementTree

from sopdeploy.errors import shorten
from sopdeploy.photos.files import lookalike_key

SEPARATOR = "|"  # of classes
REQUIRED = ("file", "classes")  # columns
# Of the required columns, also in tables of other programs; of several, the first counts.
_NAMES = {
    "file": (
        *("file", "filename", "file name", "file_name", "image", "image_name", "path"),
        *("image_id", "id"),
    ),
    "classes": ("classes", "class", "labels", "label", "choices", "choice", "annotations"),
}
# VIA's columns of a file and a region, with a JSON object each
_VIA_FILE = "file_attributes"
_VIA_REGION = "region_attributes"
_BOX = re.compile(
    r"\d+( -?[\d.]+(e-\d+)?){4,}"
)  # YOLO's: a class, and numbers of a box or an outline
UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # what Label Studio makes of a name


def read_json(content: Any) -> Iterable[dict[str, str]]:
    """Return the cells of the images in a list of objects, in a COCO file, or in one of VIA."""
    if isinstance(content, list):
        return map(read_entry, content)
    images = content.get("_via_img_metadata", content)  # of a project, or an export
    if not all(isinstance(image, dict) and _VIA_FILE in image for image in images.values()):
        return _read_coco(content)
    return _read_via(
        (image["filename"], image[_VIA_FILE], region.get(_VIA_REGION, {}))
        for image in images.values()
        for region in [{}, *_values(image["regions"])]  # at least one for each image
    )


def _values(regions: Any) -> list[Any]:
    """List the *regions* of an image, which early versions of VIA number by keys."""
    return [*regions.values()] if isinstance(regions, dict) else regions


def _read_via(
    lines: Iterable[tuple[str, dict[str, Any], dict[str, Any]]],
) -> Iterator[dict[str, str]]:
    """Yield the cells of each image from *lines* with its name, its attributes, and those of a region.

    Its classes are those in its own attributes or, without any, those in its regions.
    """
    of_file: dict[str, set[str]] = {}
    of_regions: dict[str, set[str]] = {}
    for name, attributes, region_attributes in lines:
        of_file.setdefault(name, set()).update(_via_classes(attributes))
        of_regions.setdefault(name, set()).update(_via_classes(region_attributes))
    for name, classes in of_file.items():
        yield _as_cells(name, classes or of_regions[name])


def _via_classes(attributes: Mapping[str, Any]) -> list[str]:
    """List the classes in *attributes*; raises `ValueError` if several attributes have a value.

    The value is a text, or options with true or false.
    """
    values = [value for value in attributes.values() if value]
    if not values:
        return []
    if len(values) > 1:
        raise ValueError(
            f"has the attributes {shorten([*attributes])}, of which one may be the class"
        )
    value = values[0]
    if isinstance(value, dict):
        return [name for name, is_chosen in value.items() if is_chosen]
    return [str(value)]


def read_cvat(text: str) -> Iterator[dict[str, str]]:
    """Yield the cells of each image of CVAT's XML: its tags or, without any, the labels of its shapes."""
    root = ElementTree.fromstring(text)  # noqa: S314 - expat limits entities
    for image in root.iter("image"):
        tags = {tag.attrib["label"] for tag in image.iter("tag")}
        shapes = {shape.attrib["label"] for shape in image if "label" in shape.attrib}
        yield _as_cells(image.attrib["name"], tags or shapes)


def _as_cells(file: str, classes: Iterable[str]) -> dict[str, str]:
    """Return the cells of an image, without `classes` if it has none."""
    joined = SEPARATOR.join(sorted(classes))
    return {"file": file, "classes": joined} if joined else {"file": file}


def read_entry(entry: dict[str, Any]) -> dict[str, str]:
    """Return the cells of an image from an object with its file, and its label or labels.

    Label Studio's JSON has the file in `data`, and the labels in results of `annotations`. Raises
    `KeyError` if either is missing, and `ValueError` for other objects as labels.
    """
    is_task = "annotations" in entry and "data" in entry
    given = entry["data"] if is_task else entry
    columns = rename([lookalike_key(key) for key in given])
    values: dict[str, Any] = dict(zip(columns, given.values(), strict=True))
    file = str(values["file"])
    if is_task:
        return _as_cells(file, _task_classes(entry["annotations"]))

    labels = values["classes"]
    if isinstance(labels, dict) and isinstance(labels.get("choices"), list):
        labels = labels["choices"]  # several of Label Studio's short JSON
    if isinstance(labels, dict):
        raise ValueError("no list of classes")
    if labels is None:  # null: nobody has labelled the image
        return {"file": file}
    labels = labels if isinstance(labels, list) else [labels]
    return {"file": file, "classes": SEPARATOR.join(map(str, labels))}


def _task_classes(annotations: Iterable[Mapping[str, Any]]) -> set[str]:
    """Collect the choices in a task's *annotations*; without choices, the labels of regions."""
    choices: set[str] = set()
    of_regions: set[str] = set()
    for annotation in annotations:
        for result in annotation["result"]:
            kind = result["type"]
            if kind == "choices":
                choices.update(result["value"][kind])
            elif kind.endswith("labels"):
                of_regions.update(result["value"][kind])
    return choices or of_regions


def rename(headings: Sequence[str], classes: str = "") -> list[str]:
    """Name the columns with *headings* of a file and its classes as `REQUIRED`; the others stay.

    *classes* is the heading of the classes, if it is none of the usual ones.
    """
    columns = [*headings]
    usual = _NAMES | ({"classes": (lookalike_key(classes),)} if classes else {})
    for column, names in usual.items():
        name = next((name for name in names if name in headings), None)
        if name is not None:
            columns[headings.index(name)] = column
    return columns


def _read_coco(content: Any) -> Iterator[dict[str, str]]:
    """Yield the cells of each image of a COCO file; raises `ValueError` for one of several categories."""
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    labels: dict[Any, set[str]] = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        labels[annotation["image_id"]].add(names[annotation["category_id"]])
    for image in content["images"]:
        name = str(image["file_name"])
        if len(labels[image["id"]]) > 1:
            raise ValueError(f"{name} has annotations of several categories")
        yield _as_cells(name, labels[image["id"]])


def is_of_via(text: str) -> bool:
    """Tell whether *text* is a CSV file of VIA, whose cells are JSON objects."""
    return _VIA_FILE in text.partition("\n")[0].split(",")


def read_via_csv(text: str) -> Iterator[dict[str, str]]:
    """Yield the cells of each image of the CSV file *text* of VIA, with a line per region."""
    # The first line of VIA 1 is a comment.
    lines = io.StringIO(text.removeprefix("#"), newline="")
    return _read_via(
        (line["filename"], json.loads(line[_VIA_FILE]), json.loads(line[_VIA_REGION]))
        for line in csv.DictReader(lines, strict=True)
    )


def without_brackets(classes: str) -> str:
    """Separate *classes* like `[cat,dog]`, as makesense and Python write a list; others stay.

    Several classes of Label Studio are `{"choices": ["cat", "dog"]}`.
    """
    if classes.startswith('{"choices"'):
        with suppress(ValueError, TypeError, KeyError):  # the name of a class, after all
            return SEPARATOR.join(json.loads(classes)["choices"])
    if not (classes.startswith("[") and classes.endswith("]")):
        return classes
    return SEPARATOR.join(name.strip(" '\"") for name in classes[1:-1].split(","))


def read_file_beside(text: str, suffix: str, names: Sequence[str]) -> set[str]:
    """Return the classes of an image in the *text* of a file beside it; empty if nobody labelled it.

    By *suffix*, it is JSON of LabelMe, Darwin or Supervisely, XML of Pascal VOC, or a text: one
    class, or YOLO's boxes with numbers of *names*. Classes are flags or tags or, without any, the
    labels of shapes. Raises `ValueError` and the like for others.
    """
    if suffix == ".xml":
        root = ElementTree.fromstring(text)  # noqa: S314 - expat limits entities
        return {name.text or "" for name in root.findall("object/name")}
    if suffix == ".txt":
        return _read_text_beside(text, names)

    content = json.loads(text)
    flags = content.get("flags") or {}
    tags = {name for name, is_set in flags.items() if is_set}
    tags |= {tag["name"] for tag in content.get("tags") or ()}
    tags |= {one["name"] for one in content.get("annotations") or () if "tag" in one}
    keys = {"shapes": "label", "annotations": "name", "objects": "classTitle"}
    shapes = {
        str(shape[key]) for kind, key in keys.items() for shape in content.get(kind) or ()
    }
    if not tags and not any(kind in content for kind in (*keys, "flags", "tags")):
        raise ValueError("has no shapes, annotations, objects, flags or tags")
    return tags or shapes


def _read_text_beside(text: str, names: Sequence[str]) -> set[str]:
    """Return the only line of *text* as the class, or those of *names* with which YOLO's lines begin."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not all(_BOX.fullmatch(" ".join(line)) for line in lines):
        if len(lines) > 1:
            raise ValueError("it has several lines")
        return {" ".join(lines[0])}

    numbers = {int(line[0]) for line in lines}
    if numbers and max(numbers) >= len(names):
        raise ValueError(
            f"class {max(numbers)} has no name; write all names to classes.txt, one per line"
        )
    return {names[number] for number in numbers}

"""Files of class names as tools write them: understood, or refused with what to do."""

import json
from pathlib import Path

import pytest

from sopdeploy.errors import ConfigError
from sopdeploy.weights.class_names import read_class_names

NAMES = ("cat", "dog", "bird")
CONFIG = {
    "architectures": ["X"],
    "id2label": {"0": "cat", "1": "dog", "2": "bird"},
    "label2id": {"bird": 2, "cat": 0, "dog": 1},
}
UNDERSTOOD: dict[str, tuple[str, str]] = {
    "lines": ("a.txt", "cat\ndog\n\nbird"),
    "lines of Windows": ("a.txt", "cat\r\ndog\r\nbird\r\n"),
    "lines of an old Macintosh": ("a.txt", "cat\rdog\rbird\r"),
    "a mark of the byte order": ("a.txt", "\ufeffcat\ndog\nbird"),
    "JSON": ("a.json", '["cat", "dog", "bird"]'),
    "JSON in a text file": ("a.txt", '[\n"cat",\n"dog",\n"bird"\n]'),
    "numbers as keys, in another order": ("a.json", '{"2": "bird", "0": "cat", "1": "dog"}'),
    "class_to_idx": ("a.json", '{"bird": 2, "cat": 0, "dog": 1}'),
    "config.json of a network": ("config.json", json.dumps(CONFIG)),
    "metadata.json of Teachable Machine": (
        "a.json",
        json.dumps({"imageSize": 224, "labels": NAMES}),
    ),
}


# Numbers, bullets, quotes, columns, Python and YAML beside or around the names
LEFT: dict[str, tuple[str, str]] = {
    "numbers of Teachable Machine": ("a.txt", "0 cat\n1 dog\n2 bird\n"),
    "numbers from 1": ("a.txt", "1. cat\n2. dog\n3. bird\n"),
    "numbers with colons": ("a.txt", "0: cat\n1: dog\n2: bird\n"),
    "numbers in brackets": ("a.txt", "1) cat\n2) dog\n3) bird\n"),
    "numbers behind the names": ("a.txt", "cat 0\ndog 1\nbird 2\n"),
    "a table with numbers": ("a.csv", "0,cat\n1,dog\n2,bird\n"),
    "a table with a heading": ("a.csv", "index;name\n0;cat\n1;dog\n2;bird\n"),
    "a table with numbers at the end": ("a.tsv", "cat\t0\ndog\t1\nbird\t2\n"),
    "quotes": ("a.txt", '"cat"\n"dog"\n"bird"\n'),
    "quotes and commas": ("a.txt", "'cat',\n'dog',\n'bird'\n"),
    "numbers and quotes": ("a.txt", "0: 'cat'\n1: 'dog'\n2: 'bird'\n"),
    "quotes and numbers": ("a.txt", '"cat": 0,\n"dog": 1,\n"bird": 2\n'),
    "bullets and quotes": ("a.txt", '- "cat"\n- "dog"\n- "bird"\n'),
    "bullets, numbers and quotes": ("a.md", '* 0 "cat"\n* 1 "dog"\n* 2 "bird"\n'),
    "a table with a heading and quotes": ("a.csv", 'id,name\n0,"cat"\n1,"dog"\n2,"bird"\n'),
    "commas": ("a.txt", "cat,\ndog,\nbird,\n"),
    "bullets": ("a.md", "- cat\n- dog\n- bird\n"),
    "bullets and numbers": ("a.md", "* 0 cat\n* 1 dog\n* 2 bird\n"),
    "lines of JSON": ("a.jsonl", '"cat"\n"dog"\n"bird"\n'),
    "a Python dictionary": ("a.txt", "{2: 'bird',\n 0: 'cat',\n 1: 'dog'}"),
    "a Python list": ("a.txt", "['cat', 'dog', 'bird']"),
    "data.yaml": ("data.yaml", "nc: 3\nnames: [cat, dog, bird]\n"),
    "data.yaml with numbers": ("data.yml", "names:\n  0: cat\n  1: dog\n  2: bird\n"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_beside_a_name_is_refused_and_never_part_of_it(
    case: str, tmp_path: Path
) -> None:
    name, text = LEFT[case]
    (tmp_path / name).write_bytes(text.encode())

    with pytest.raises(ConfigError, match="name per line"):
        read_class_names(tmp_path / name)


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_names_that_tools_write_are_understood(case: str, tmp_path: Path) -> None:
    name, text = UNDERSTOOD[case]
    (tmp_path / name).write_bytes(text.encode())

    assert read_class_names(tmp_path / name) == NAMES


LITERAL = {
    "numbers alone": ("0", "1", "2"),
    "commas in names": ("tench, Tinca tinca", "goldfish, Carassius auratus", "shark"),
    "numbers at the end": ("Boeing 747", "Airbus 320"),
    "grades": ("grade 0", "grade 1", "grade 2"),
    "numbers of a few names": ("3 series", "suv", "7up"),
    "colons inside": ("re:zero", "a::b"),
    "models that repeat": ("a1 red", "a1 blue", "b2 red"),
    "hyphens": ("-cat", "dog-"),
    "marks": ("?", "!", "\N{CAT FACE}"),
}


@pytest.mark.parametrize("case", LITERAL)
def test_a_number_or_a_mark_that_belongs_to_a_name_stays(case: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(LITERAL[case]), encoding="utf-8")
    assert read_class_names(tmp_path / "a.txt") == LITERAL[case]


REFUSED_FILES: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("a.txt", b"\n \n", "holds no name"),
    "another encoding": ("a.txt", "m\xf6we".encode("latin-1"), "UTF-8"),
    "numbers in another order": ("a.txt", b"1 cat\n10 dog\n2 bird", "have numbers"),
    "numbers that lack some": ("a.txt", b"0 cat\n2 dog", "have numbers"),
    "lines in another order": ("a.csv", b"cat,1\ndog,0", "a table of 2 columns"),
    "numbers of one name": ("a.txt", b"1 euro\n2 euro", "have numbers"),
    "a name without a number": ("a.txt", b"0 cat\n1 dog\nbird", "have numbers|has a key"),
    "a heading without columns": (
        "a.txt",
        b"names:\n 0: cat\n 1: dog",
        "have numbers|has a key",
    ),
    "ids of WordNet": ("a.txt", b"n01440764 tench\nn01443537 goldfish", "n01440764"),
    "numbers and ids": ("a.txt", b"0 n01440764 tench\n1 n01443537 goldfish", "have numbers"),
    "more columns": ("a.csv", b"0,cat,pet\n1,dog,pet", "a table of 3 columns"),
    "columns without numbers": ("a.csv", b"cat,pet\ndog,pet", "a table of 2 columns"),
    "one line": ("a.csv", b"cat, dog, bird", "in one line"),
    "a comment": ("a.txt", b"# classes\ncat\ndog", "name 1 .*'# classes'"),
    "a heading above bullets": ("a.txt", b"classes\n- cat\n- dog", "name 2 .*bullet"),
    "some quotes": ("a.txt", b"'cat'\ndog", "name 1 .*quote"),
    "numbers and some quotes": ("a.txt", b"0 'cat'\n1 dog", "have numbers"),
    "numbers and bullets": ("a.txt", b"0 - cat\n1 - dog", "have numbers"),
    "columns in quotes": ("a.csv", b'"0","cat"\n"1","dog"', "name 1 .*quote"),
    "a key": ("a.txt", b"nc: 3\nnames: [cat, dog]", "name 1 has a key"),
    "a label map of TensorFlow": (
        "a.pbtxt",
        b"item {\n id: 1\n name: 'cat'\n}",
        "name 1 has a bracket",
    ),
    "a bracket that is not closed": ("a.txt", b"['cat',\n'dog'", "not JSON"),
    "code": ("a.txt", b"[__import__('os').getcwd()]", "not JSON"),
    "JSON that is cut off": ("a.json", b'["cat", "dog', "not JSON"),
    "numbers of a dictionary from 1": ("a.json", b'{"1": "cat", "2": "dog"}', "1 to 2"),
    "two lists": (
        "a.json",
        b'{"names": ["a"], "x": {"classes": ["b"]}}',
        r"several lists of names \(names, x\.cla",
    ),
    "two texts for a class": ("a.json", b'{"0": ["n01440764", "tench"]}', "list of names"),
    "a name twice": ("a.txt", b"crane\ncat\ncrane", "'crane': .*twice"),
    "an empty name": ("a.json", b'["cat", "", "dog"]', "its name is empty"),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_what_may_be_more_than_names_is_refused(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED_FILES[case]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        read_class_names(tmp_path / name)


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_a_refused_name_is_accepted_in_a_list_of_json(case: str, tmp_path: Path) -> None:
    lines = REFUSED_FILES[case][1].decode("latin-1").split("\n")
    names = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if names:
        (tmp_path / "a.json").write_text(json.dumps(names), encoding="utf-8")
        assert read_class_names(tmp_path / "a.json") == names

"""The question "did you mean ...?": which names it asks for, and how."""

import pytest

from sopdeploy.base.nearest import MAX_COMPARED, ask_for, did_you_mean, nearest_names

RESNETS = ("resnet18", "resnet34", "resnet50", "dsop-resnet18", "vgg16")


KEYS = ("epochs", "optimizer.lr", "optimizer.lr_end", "schedule.lr", "pretrained.epochs")


LONG = "a" * MAX_COMPARED


NEAREST: dict[str, tuple[str, tuple[str, ...], list[str]]] = {
    "two letters changed places": ("rsenet50", RESNETS, ["resnet50"]),
    "several as near": ("resnet19", RESNETS, ["resnet18"]),
    "a version that nobody has": ("resnet", RESNETS, ["resnet18", "resnet34", "resnet50"]),
    "another case": ("ResNet18", RESNETS, ["resnet18"]),
    "a name of another case": ("relu", ("ReLU", "GELU"), ["ReLU"]),
    "names that differ in case": ("ReLUU", ("ReLU", "relu"), ["ReLU"]),
    "the name itself": ("epochs", KEYS, ["epochs"]),
    "the end of dotted names": ("lr", KEYS, ["optimizer.lr", "schedule.lr"]),
    "no end of a dotted name": ("ochs", KEYS, ["epochs"]),
    "a dotted name": ("optimizer.ls", KEYS, ["optimizer.lr"]),
    "nothing alike": ("zebra", RESNETS, []),
    "nothing wanted": ("", KEYS, []),
    "no names": ("lr", (), []),
    "a long name is cut": (f"{LONG}b{LONG}", (LONG,), [LONG]),
}


@pytest.mark.parametrize("case", NEAREST)
def test_the_names_nearest_to_a_wrong_one_are_found(case: str) -> None:
    wanted, names, nearest = NEAREST[case]
    assert nearest_names(wanted, names) == nearest


QUESTIONS = {
    "did you mean A?": ask_for("A"),
    "did you mean A or B?": ask_for("A", "B"),
    "did you mean A, B or C?": ask_for("A", "B", "C"),
    "did you mean resnet18, resnet34 or resnet50?": did_you_mean("resnet", RESNETS),
    "did you mean --set lr=VALUE?": did_you_mean("lrr", {"lr": "--set lr=VALUE"}),
    "": did_you_mean("zebra", RESNETS),
    "list them": did_you_mean("zebra", RESNETS, "list them"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_question_names_what_is_near(question: str) -> None:
    assert QUESTIONS[question] == question


def test_the_name_of_a_family_leads_to_names_that_contain_it() -> None:
    names = ["digits-plain", "digits-gsop-net1", "fine-tune-gsop", "gsopping-net"]
    assert nearest_names("gsop", names) == ["digits-gsop-net1", "fine-tune-gsop"]

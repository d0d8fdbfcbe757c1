"""Messages that name an argument say so in `advice`, and the command line has an option for each."""

import ast
import re
from pathlib import Path

import pytest

import rewrite_core as rc
from rewrite_core.cli.entry import COMMANDS, parser
from rewrite_core.cli.messages import MOST_CHARACTERS, OPTIONS, in_options, shown
from rewrite_core.errors import MismatchError, UnderdeterminedWarning, argument, warn

PACKAGE = Path(rc.__file__).parent


def text_of(node):
    """The constant text of a string, with {} for what an f-string fills in."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    if not all(isinstance(part, ast.Constant | ast.FormattedValue) for part in parts):
        return None
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)


def messages():
    """(file and line, text, advice) of every error and warning of the library that is one string."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if "cli" in file.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                text = text_of(node.args[0])
                if text and (node.func.id.endswith("Error") or node.func.id == "warn"):
                    advice = next((word.value for word in node.keywords if word.arg == "advice"), None)
                    if not isinstance(advice, ast.Attribute):  # error.advice is passed on
                        where = f"{file.name}:{node.lineno}"
                        yield where, text, {} if advice is None else ast.literal_eval(advice)


MESSAGES = list(messages())
STRINGS = [
    node.value
    for file in PACKAGE.rglob("*.py")
    if "cli" not in file.parts
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
]


def test_all_messages_are_looked_at():
    assert len(MESSAGES) > 150 and sum(bool(advice) for _, _, advice in MESSAGES) > 8


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.isidentifier()])
def test_what_a_message_advises_is_in_its_advice(name):
    for where, text, advice in MESSAGES:
        if re.search(rf"(?<![\w(]){name}=(?!=)", text):  # not in a call, such as revert(force=True)
            assert name in advice, f"{where} says {name}= without advice={{...}}"


def test_advice_is_said_and_has_its_option():
    for where, text, advice in MESSAGES:
        for name, value in advice.items():
            said = text if "{}" not in text else "".join(STRINGS)  # it may be in what is filled in
            assert argument(name, value) in said, f"{where} does not say {argument(name, value)}"
            assert name in OPTIONS, f"{where}: the command line has no option for {name}"


def test_options_of_the_advice_exist_and_are_advised():
    [commands] = [action.choices for action in parser()._actions if action.metavar == "COMMAND"]
    assert len(commands) == len(COMMANDS)
    known = {word for sub in commands.values() for action in sub._actions for word in action.option_strings}
    advised = {name for _, _, advice in MESSAGES for name in advice}
    for name, words in OPTIONS.items():
        assert {word for word in words.split() if word.startswith("--")} <= known, words
        assert name in advised, f"no message advises {name} any more"


def test_messages_in_the_words_of_the_command_line():
    error = MismatchError("Apply those first,\n or pass force=True.", advice={"force": True})
    assert error.advice == {"force": True} and str(error).endswith("force=True.")
    assert in_options(error, error.advice) == "Apply those first, or pass --force."
    with pytest.warns(UnderdeterminedWarning, match=r"preserve=0\.3") as seen:
        warn("A lower rank, or preserve=0.3.", UnderdeterminedWarning, advice={"preserve": 0.3})
    assert in_options(seen[0].message, seen[0].message.advice) == "A lower rank, or --preserve 0.3."
    assert in_options("use solver='adam'.", {"solver": "adam"}) == "use --solver adam."


def test_messages_are_short_and_safe_to_show():
    long = shown("a" * 5000 + "; use --force.")
    assert len(long) <= MOST_CHARACTERS + 10 and long.endswith("; use --force.")
    assert "\x1b" not in shown("a\x1b[31mb\nc") and shown("a\nb") == "a b"

"""Flags made from a dataclass."""

from dataclasses import dataclass

import pytest

from nanomblip.flags import flag, parse_flags


@dataclass(frozen=True)
class Config:
    steps: int = flag(10, "steps")
    lr: float = flag(0.1, "rate")
    fast: bool = flag(True, "speed")
    kind: str = flag("a", "which", ("a", "b"))
    image: list = flag((), "files", many=True)


def parse(text):
    return parse_flags(Config, text.split(), "test")


def test_values_have_the_type_of_their_field():
    assert parse("") == Config()
    assert parse("--steps 3 --lr 1e-3 --no_fast --kind b --image x y") == Config(3, 1e-3, False, "b", ["x", "y"])
    assert parse("--lr 1 --fast").lr == 1.0 and isinstance(parse("--lr 1").lr, float)


@pytest.mark.parametrize("text,words", [
    ("--steps x", "--steps"), ("--steps 1.5", "--steps"), ("--kind c", "--kind"), ("--step 3", "did you mean --steps"),
    ("--no-fast", "--no_fast"), ("--fast False", "False"), ("stray", "stray"), ("--zzzzzz", "unknown argument '--zzzzzz'"),
])  # fmt: skip
def test_everything_else_is_one_line_and_status_2(capsys, text, words):
    with pytest.raises(SystemExit) as end:
        parse(text)
    err = capsys.readouterr().err
    assert end.value.code == 2 and words in err and err.count("\n") == 1


def test_help_shows_defaults_and_reasons(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    assert "rate (default: 0.1)" in out and "--no_fast" in out and "{a,b}" in out

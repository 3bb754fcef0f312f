"""Command lines from dataclasses: each field is a flag, with its default, its choices and a reason.

    @dataclass(frozen=True)
    class Config:
        steps: int = flag(1000, "optimizer steps")

    cfg = parse_flags(Config, argv, "What the script does.")

Booleans become `--name / --no_name`. An unknown flag fails with the nearest known one; every error is one line on stderr
and exit status 2.
"""

import argparse
import difflib
import os
import sys
from dataclasses import MISSING, field, fields
from pathlib import Path


def flag(default, help: str, choices: tuple | None = None, many: bool = False):
    """A dataclass field with what the command line needs to know about it; `many` takes one or more values."""
    return field(default=default, metadata={"help": help, "choices": choices, "many": many})


class _Switch(argparse.Action):
    """`--name` sets True, `--no_name` False."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__([f"--{dest}", f"--no_{dest}"], dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def parse_flags(cls, argv: list[str], description: str):
    """Build the dataclass `cls` from command-line words; exits with status 2 and one line on anything wrong."""
    parser = _Parser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(cls):
        kinds = [
            kind for kind in getattr(f.type, "__args__", (f.type,)) if kind is not type(None)
        ]  # of `int | None`: int
        kind = kinds[0] if isinstance(kinds[0], type) else type(f.default)
        options = dict(default=f.default, help=f.metadata["help"])
        if kind is bool:  # never type=bool: bool("False") is True
            options["action"] = _Switch
        else:
            options |= dict(type=str if f.metadata["many"] else kind, choices=f.metadata["choices"])
            options |= dict(metavar=f.name.upper()) if f.metadata["choices"] is None else {}
            options |= dict(nargs="+") if f.metadata["many"] else {}
        assert f.default is not MISSING, f"{f.name} needs a default"
        parser.add_argument(f"--{f.name}", **options)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        parser.error(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return cls(**vars(known))


def run_main(main) -> None:
    """Run a script's `main(argv)`; what the user can mend is one line on stderr and exit status 2, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show Khmer must not end the program
    try:
        status = main(sys.argv[1:])
    except BrokenPipeError:  # `python sample.py ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its exit
        status = 141
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)

"""Command lines from dataclasses: each field is a flag, with its default, its choices and a reason.

    @dataclass(frozen=True)
    class Config:
        steps: int = flag(1000, "optimizer steps")

    cfg = parse_flags(Config, argv, "What the script does.")

Booleans become `--name / --no_name`. An unknown flag fails with the nearest known one; every error is one line on
stderr and exit status 2.
"""

import argparse
import builtins
import difflib
import os
import sys
from contextlib import suppress
from dataclasses import MISSING, field, fields
from pathlib import Path


def flag(default, help: str, choices: tuple | None = None, many: bool = False, group: str = ""):
    """A dataclass field with what the command line needs to know about it; `many` takes one or more values, and with
    `group` a heading of --help begins, which holds for the fields below too."""
    return field(default=default, metadata={"help": help, "choices": choices, "many": many, "group": group})


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
    parser = _Parser(description=description, allow_abbrev=False, usage="%(prog)s [--flag VALUE ...]")
    place = parser
    for f in fields(cls):
        if f.metadata["group"]:
            place = parser.add_argument_group(f.metadata["group"])
        kinds = [
            kind for kind in getattr(f.type, "__args__", (f.type,)) if kind is not type(None)
        ]  # of `int | None`: int
        kind = kinds[0] if isinstance(kinds[0], type) else type(f.default)
        told = "" if f.default in (None, "", (), False) else f" (default: {f.default})"
        options = dict(default=f.default, help=(f.metadata["help"] + told).replace("%", "%%"))
        if kind is bool:  # never type=bool: bool("False") is True
            options["action"] = _Switch
        else:
            options |= dict(type=str if f.metadata["many"] else kind, choices=f.metadata["choices"])
            options |= dict(metavar=f.name.upper()) if f.metadata["choices"] is None else {}
            options |= dict(nargs="+") if f.metadata["many"] else {}
        assert f.default is not MISSING, f"{f.name} needs a default"
        place.add_argument(f"--{f.name}", **options)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        parser.error(f"unknown argument {unknown[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return cls(**vars(known))


class _Messages:
    """Standard error that never ends a program: what nobody can read any more (closed, a broken pipe) is dropped."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def run_main(main) -> None:
    """Run a script's `main(argv)`; what the user can mend is one line on stderr and exit status 2, not a traceback.

    Works with whatever stands behind stdout and stderr: a terminal, a pipe, a notebook (`%run`), or nothing (`>&-`).
    """
    before = sys.stderr
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # 0 to 2 closed: else the next file that is opened gets it
        pass
    os.close(number)
    sys.stderr = _Messages(open(os.devnull, "w", encoding="utf-8") if before is None else before)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's stream shows everything already
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show Khmer must not end the program
    try:
        status = _status_of(main)
    finally:
        sys.stderr = before
        _drop(before)
    if not hasattr(builtins, "__IPYTHON__"):  # there it would be a second message below the one that says what is wrong
        raise SystemExit(status)


def _status_of(main) -> int:
    """Call `main` with the words of the command line; its exit status, whatever happens in it."""
    try:
        status = main(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except SystemExit as end:  # parse_flags has said why
        return end.code
    except BrokenPipeError:  # `python sample.py ... | head -1`
        _drop(sys.stdout)
        return 141
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, OSError):  # it may be stdout itself, on a full disk
            _drop(sys.stdout)
        return 2
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU; torch is not imported here
            raise
        advice = "give a smaller --batch; in training with more --accumulate, or --checkpointing, or --int8"
        print(f"{Path(sys.argv[0]).name}: error: the memory of the GPU is full: {advice}", file=sys.stderr)
        return 2


def _drop(stream) -> None:
    """Flush a stream, and lead it to nowhere if it does not take its text: else Python complains again at its exit."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):  # a stream without a number
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    except (AttributeError, ValueError):  # None, or closed
        pass

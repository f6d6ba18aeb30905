"""The program `steer`: find the verb, import it, call it, and turn what goes wrong into one paragraph and a status.

Status 0: done; 1: our fault (a traceback with STEER_DEBUG=1); 2: the caller's, or the disk's; 130: interrupted.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from types import TracebackType

from steer.cli.verbs import GROUPS, VERBS, Verb
from steer.errors import SteerError

ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], None]
GLOBAL = ("--json", "--quiet", "-q")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST, errno.ENOTDIR)
DISK_TOO = (errno.EISDIR, errno.ENAMETOOLONG, errno.EFBIG, errno.EIO, errno.EXDEV)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.excepthook = _our_fault(given)
    sys.exit(run(given))


def run(given: list[str]) -> int:
    """Run the command line `given` (without the program's name) and return its status."""
    as_json = "--json" in given
    try:
        words = _verb_first(given)
        if not words or words[0] in ("--help", "-h", "help"):
            return _say(overview())
        if words[0] in ("--version", "-V"):
            from steer import __version__

            return _say(f"reasoning-steer {__version__}")
        if words[0] in GROUPS and (len(words) == 1 or words[1] in ("--help", "-h")):
            return _say(overview(words[0]))
        from steer.cli.origin import check_origin

        check_origin()
        verb = find(words)
        return _call(verb, words[len(verb.name.split()) :])
    except SteerError as error:
        return complain(error.found, error.expected, error.remedy, as_json, str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DISK + DISK_TOO:
            raise
        where = f" ({_as_given(str(error.filename))})" if error.filename else ""
        remedy = "Make room on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Check the path and rights"
        return complain(f"{error.strerror or error}{where}", "", remedy, as_json)
    except KeyboardInterrupt:
        return 130


def _as_given(path: str) -> str:
    """A path without what we add to the name of a file or folder while it is written."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + re.sub(r"^\.?(.+?)(\.\d+)?\.partial$", r"\1", name)


def overview(group: str | None = None) -> str:
    """Return the help of the program, or of a group of verbs."""
    verbs = [verb for verb in VERBS.values() if group is None or verb.name.startswith(f"{group} ")]
    width = max(len(verb.name) for verb in verbs)
    lines = [f"  {verb.name.ljust(width)}  {verb.help}" for verb in verbs]
    head = [
        f"Usage: steer {group or 'VERB'} {'VERB ' if group else ''}[OPTIONS] …",
        "",
        f"{GROUPS[group].capitalize()}."
        if group
        else "Find, apply and verify changes to how a reasoning model thinks.",
        "",
    ]
    tail = [
        "",
        "Everywhere: --json (one object on stdout), --seed N, --quiet, --help.",
        "A MODEL is a hub id, a folder, a file.gguf, or organism:chain (bundled).",
    ]
    return "\n".join(head + lines + tail)


def find(words: Sequence[str]) -> Verb:
    """Return the verb that `words` start with.

    Raises:
        SteerError: there is none.
    """
    for name in (" ".join(words[:2]), words[0]):
        if name in VERBS:
            return VERBS[name]
    wrong = " ".join(words[:2]) if words[0] in GROUPS else words[0]
    known = [name for name in VERBS if words[0] not in GROUPS or name.startswith(f"{words[0]} ")]
    from difflib import get_close_matches

    close = get_close_matches(wrong, known, 1)
    remedy = f"Perhaps `steer {close[0]}` was meant" if close else "See `steer --help`"
    raise SteerError(f"there is no verb {wrong!r}", f"one of {', '.join(known)}", remedy)


def _verb_first(given: list[str]) -> list[str]:
    """Move global options that stand before the verb behind it."""
    start = 0
    while start < len(given) and (given[start] in GLOBAL or given[start].startswith("--seed")):
        start += 2 if given[start] == "--seed" else 1
    return given[start:] + given[:start]


def _call(verb: Verb, arguments: list[str]) -> int:
    if not sys.stderr.isatty() or {"--quiet", "-q"} & set(arguments):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers asks when it is imported.
    import typer

    usage_error: type[Exception] = next(
        kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
    )
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    command = import_module(verb.module).command
    app.command(verb.name, context_settings={"help_option_names": ["--help", "-h"]})(command)
    try:
        status = app(arguments, prog_name=f"steer {verb.name}", standalone_mode=False)
    except typer.Abort:
        return 130
    except usage_error as error:
        found = str(getattr(error, "format_message", error.__str__)()).replace("'", "`")
        raise SteerError(found, "", f"See `steer {verb.name} --help`") from None
    return status if isinstance(status, int) else 0


def _say(text: str) -> int:
    print(text)
    return 0


def complain(found: str, expected: str, remedy: str, as_json: bool, paragraph: str = "", status: int = 2) -> int:
    """Tell what went wrong, as one paragraph on stderr or one JSON object on stdout; return `status`."""
    message = paragraph or str(SteerError(found, expected, remedy))
    if as_json:
        from steer.cli.output import dumps

        parts = {"message": message, "found": found, "expected": expected, "remedy": remedy, "status": status}
        print(dumps({"error": parts}), flush=True)
    else:
        print(f"steer: {message}", file=sys.stderr)
    return status


def _our_fault(given: list[str]) -> ExceptHook:
    """Return what Python calls on an exception that nobody expected; Python then exits with 1."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        debug = bool(os.environ.get("STEER_DEBUG"))
        if debug:
            traceback.print_exception(kind, error, trace)
        text = " ".join(str(error).split()) or "no message"
        remedy = "" if debug else "Run again with STEER_DEBUG=1 for the traceback and report it"
        complain(f"this is our fault, not yours: {kind.__name__}: {text}", "", remedy, "--json" in given, status=1)

    return show

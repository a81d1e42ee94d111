"""Ask before anything is removed."""

import sys

from myllm.errors import UserError


def confirm(question: str, yes: bool) -> None:
    """Go on only if the user says yes; else the command ends with exit code 1, and nothing has changed.

    Args:
        yes: the command has --yes: don't ask.

    Raises:
        UserError: there is no terminal to ask on.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question} There is no terminal to answer on; give --yes to do it")
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        print("nothing was changed")
        raise SystemExit(1)

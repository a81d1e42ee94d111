"""The one exception for things a user can put right."""


class UserError(ValueError):
    """Input that cannot work: says what was seen, what was expected, and what to do.

    Entry points print the message without a traceback and exit with code 2. Anything else that is
    raised is a fault of this project and keeps its traceback.
    """


class MachineError(UserError):
    """A UserError that the run's other machines may not share, such as a damaged file: each machine says its own."""


def nearest(word: str, known: list[str]) -> str:
    """`", did you mean 'x'?"` for the closest known word, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""

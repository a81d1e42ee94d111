"""How a program ends in a fork, where no interpreter turns its exceptions into an exit code."""

import sys
import traceback
from collections.abc import Callable


def exit_code(program: Callable[[], object], crashed: int = 1) -> int:
    """The code with which an interpreter would end; prints on stderr what it would.

    Args:
        crashed: the code after any other exception than SystemExit.
    """
    try:
        program()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return crashed
    return 0

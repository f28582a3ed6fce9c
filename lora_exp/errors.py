"""The one kind of error that is a message, and how it is told from a bug."""

from __future__ import annotations

import traceback
from pathlib import Path

_ROOM = str(Path(__file__).parent)


class UserError(ValueError):
    """Something that the user can mend: says the value, the reason and the next move, and is shown without a traceback.

    Any other exception is a bug, of ours or of a library, and keeps its traceback.
    """


def is_bug(error: BaseException) -> bool:
    """Whether a line of this package raised ``error``, which is no message.

    Of what a library raises about files or names that a user gave it, a message is made where it is called; what our
    own lines raise inside of that call (an unpacking, a ``zip(strict=True)``) must not be taken for such.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return not isinstance(error, UserError) and bool(frames) and frames[-1].filename.startswith(_ROOM)


class RefusedError(UserError):
    """A job that was refused before it touched anything: what its folder holds of an earlier one stays true."""

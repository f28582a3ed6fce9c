"""The one kind of error that is a message."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can mend: says the value, the reason and the next move, and is shown without a traceback.

    Any other exception is a bug, of ours or of a library, and keeps its traceback.
    """

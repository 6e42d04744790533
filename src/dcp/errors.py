"""What may go wrong beside a user's mistake, which is a ``ValueError``."""

from __future__ import annotations


class DCPError(RuntimeError):
    """Something this library rests on failed; the message is one line for the user."""

"""The one exception for mistakes that a user can mend."""

from pathlib import Path


class UserError(Exception):
    """Bad input; the text says what is wrong, where, and how to mend it.

    The command line prints the text as one paragraph and ends with exit code 2.
    """


class UnwritableError(UserError):
    """A file that cannot be written; `strerror` says why."""

    def __init__(self, path: Path, strerror: str) -> None:
        super().__init__(f"{path} cannot be written ({strerror}).")
        self.strerror = strerror


class LoaderError(UserError):
    """The processes that load images have ended or cannot hand them on, whatever the image."""


class AlreadyReportedError(UserError):
    """An error of which another process of the same run tells the user."""

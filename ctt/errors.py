"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """Bad input; the text says what is wrong, where, and how to mend it.

    The command line prints the text as one paragraph and ends with exit code 2.
    """


class AlreadyReportedError(UserError):
    """An error of which another process of the same run tells the user."""

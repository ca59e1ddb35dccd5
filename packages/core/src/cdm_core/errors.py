"""The one exception that means "the caller can mend this"."""


class UserError(Exception):
    """Bad input: one line that says what was wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class MissingPackage(UserError):
    """An optional package is not installed; the message says which, and how to get it."""

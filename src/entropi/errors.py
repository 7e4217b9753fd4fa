"""The one exception that a person is meant to read."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """

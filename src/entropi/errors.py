"""The one exception that a person is meant to read."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """


def is_failure(error: BaseException) -> bool:
    """Whether a library failed: an Exception, or a panic of one written in Rust, which is none and has no public class.

    Anything else, such as Ctrl-C, is not to be turned into an error.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"

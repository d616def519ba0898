"""The exceptions that users see."""


class UserError(ValueError):
    """A mistake that the caller can correct. The message is one line: what is wrong, and what to do.

    The command line prints `smallm: <message>` and exits with code 2.
    """


class ProcessError(UserError):
    """A mistake that only one of several processes notices; this process prints the message, whatever its rank."""

"""The one exception that users meet."""


class UserError(ValueError):
    """Something the caller can mend: a single line that says what is wrong and what to do about it.

    The command line prints it as ``smallm: <message>`` and exits with code 2.
    """


class ProcessError(UserError):
    """One that shows on a single one of several processes: that one says it, whichever it is."""

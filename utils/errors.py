"""The two ways a command ends badly on purpose; anything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Bad input: settings, files, data. Nothing was started. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """A run that could not go on (a reward that failed, a hub out of reach). Exit code 1."""

    exit_code = 1

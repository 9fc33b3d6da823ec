"""The one exception that is shown to users as a line instead of a traceback."""


class UserError(Exception):
    """Something the user can mend: one line with the value and the remedy."""

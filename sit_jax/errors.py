"""The one exception that is shown to users as a line instead of a traceback."""

LONGEST = 1000  # characters


def one_line(message):
    """A message fit for a terminal: names from a file may hold anything."""
    said = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in str(message)
    )
    if len(said) <= LONGEST:
        return said
    return f"{said[: LONGEST // 2]} ... {said[-LONGEST // 2 :]}"


class UserError(Exception):
    """Something the user can mend: one line with the value and the remedy."""

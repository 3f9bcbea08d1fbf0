"""The one kind of exception that is shown to a user as a single line, without a traceback."""


class UserError(Exception):
    """A mistake that the user can mend: its one line names the file, line or flag and says how."""

    def __str__(self):
        """On one line whatever a file's name holds: line ends, a terminal's commands, bytes that are no text."""
        text = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

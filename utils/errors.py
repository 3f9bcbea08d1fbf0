"""The one kind of exception that is shown to a user as a single line, without a traceback."""


class UserError(Exception):
    """A mistake that the user can mend: its one line names the file, line or flag and says how."""

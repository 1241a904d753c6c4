"""What a run answers instead of a traceback when the cause lies outside of the program."""


class RunError(ValueError):
    """A run that was asked for wrongly or cannot go on; its text is a whole sentence for the user."""

"""The error that a user sees."""


class LukvError(Exception):
    """Bad input or a bad environment. The message is one line: what is wrong, and what to do."""

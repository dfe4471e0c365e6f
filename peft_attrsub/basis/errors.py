"""The one exception of the basis room: bad input, told in one sentence."""


class BasisError(ValueError):
    """Bad input: the sentence says what was given, what was expected and what to do."""

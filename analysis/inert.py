"""Names and texts of a run, which somebody else may have chosen, made harmless to what shows them."""


def inert(text: object) -> str:
    r"""The text with what would steer a terminal or a line (escape sequences, line breaks, reversed writing) spelled out.

    >>> inert("κ\x1b[2J")
    'κ\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))

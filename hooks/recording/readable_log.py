"""What the recorder logs, on one line and as text, whatever the names in it hold."""

import logging

from ...diagnostics.escape import inert, shortened


def readable(record: logging.LogRecord) -> bool:
    """A filter of the logger `optiscope` that lets everything pass, its message spelled out where it would steer a terminal or a line."""
    try:
        message = record.getMessage()
    except Exception:
        return True  # the handler tells of a message that does not fit its arguments
    record.msg, record.args = shortened(inert(message), 1_000), ()
    return True

"""What the recorder logs, on one line and as text, whatever the names in it hold."""

import logging

from ...diagnostics.escape import escaped, shortened


def readable(record: logging.LogRecord) -> bool:
    """A filter of the logger `optiscope` that lets everything pass, its message spelled out where it would steer a terminal or a line."""
    try:
        message = record.getMessage()
    except Exception:
        return True  # the handler tells of a message that does not fit its arguments
    record.msg, record.args = shortened(escaped(message), 1_000), ()
    return True

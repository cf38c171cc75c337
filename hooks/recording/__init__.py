"""From observations to the store: when to record, the record being filled, and what becomes of it."""

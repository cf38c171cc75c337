"""Which Newton–Schulz iteration an optimizer of an unknown class runs, found by watching one of its steps on a copy."""

"""Newton–Schulz iterations: families of coefficients, what they do to a spectrum, and whether a list can be trusted."""

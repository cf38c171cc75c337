"""From an optimizer's step to what is measured: which matrices there are, and what is copied and read around a step."""

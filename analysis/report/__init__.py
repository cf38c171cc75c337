"""One self-contained page about a run, or about several beside each other."""

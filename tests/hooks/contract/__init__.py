"""The contract suite: every supported optimizer, one table of cases."""

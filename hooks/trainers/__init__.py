"""Attaching from trainers, and from scripts that know nothing of it."""

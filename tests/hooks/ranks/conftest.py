"""Pools of ranks, one for each number of them."""

import pytest

from .pool import Pool


@pytest.fixture(scope="session")
def pools():
    """A function that gives the pool of so many ranks."""
    made = {}

    def pool(size):
        if size not in made or not made[size].is_open:
            made[size] = Pool(size)
        return made[size]

    yield pool
    for one in made.values():
        one.close()

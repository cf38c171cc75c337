"""What ranks say to each other as bytes: Python's own objects, between the processes of one training, over connections and a store that the training set up."""

import pickle
from typing import Any


def packed(words: Any) -> bytes:
    """As bytes."""
    return pickle.dumps(words)


def unpacked(data: bytes) -> Any:
    """What another rank of this training has packed; never what was read from a file."""
    return pickle.loads(data)

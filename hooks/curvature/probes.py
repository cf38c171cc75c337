"""Random directions from a generator of the recorder's own."""

import torch
from torch import Tensor


class Probes:
    """Draws from private generators, one per device, all seeded alike: the training's random numbers stay untouched."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def like(self, tensor: Tensor, distribution: str) -> Tensor:
        """Independent entries of mean 0 and variance 1 in the tensor's shape and format: ±1 ("rademacher") or N(0, 1) ("gaussian")."""
        draw = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if distribution == "gaussian":
            return draw.normal_(generator=self.on(tensor.device))
        return draw.bernoulli_(0.5, generator=self.on(tensor.device)).mul_(2).sub_(1)

    def integers(self, high: int, count: int) -> list[int]:
        """Independent integers under `high`."""
        cpu = torch.device("cpu")
        found: list[int] = torch.randint(high, (count,), generator=self.on(cpu)).tolist()
        return found

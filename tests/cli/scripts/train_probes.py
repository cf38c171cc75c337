"""Three trainings of their own, and between them probes of a few steps."""

import torch


def train(width, steps):
    model = torch.nn.Linear(3, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()


for width, steps in ((4, 12), (4, 3), (4, 13), (2, 2), (5, 14)):
    train(width, steps)

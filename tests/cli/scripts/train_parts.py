"""A training whose model and optimizers are made by another module beside it."""

import torch
from train_parts_making import Model, make_optimizers


def main():
    torch.manual_seed(0)
    model = Model()
    optimizers = make_optimizers(model)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in optimizers]
    for step in range(5):
        x = torch.randint(0, 32, (4, 8))
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        for thing in (*optimizers, *schedulers):
            thing.step()
        print(step, loss.item().hex())
    print(torch.rand(1).item().hex(), *(p.detach().double().sum().item().hex() for p in model.parameters()))


if __name__ == "__main__":
    main()

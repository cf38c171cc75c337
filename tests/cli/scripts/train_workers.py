"""Trains on what processes of its own load, pickles what it defines, makes an optimizer late, and fails at the end."""

import logging
import pickle
import sys

import torch
from torch.utils.data import DataLoader, Dataset

logging.basicConfig(stream=sys.stdout, level=logging.DEBUG)


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((4,), float(index))


def main():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1)]
    for context in ("fork", "spawn"):
        loader = DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context=context)
        for batch in loader:
            model.zero_grad()
            model(batch).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            print(context, type(loader.dataset).__module__, batch.sum().item())
        if len(optimizers) == 1:
            optimizers.append(torch.optim.AdamW(model[1].parameters()))
    print(len(pickle.loads(pickle.dumps(Numbers()))), len(pickle.loads(pickle.dumps(optimizers[0])).param_groups))
    raise ValueError("enough")


if __name__ == "__main__":
    main()

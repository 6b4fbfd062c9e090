"""Export a network of your own without the branch that only trains it.

python own_network.py
"""

import torch
from torch import nn

import sopdeploy


class Network(nn.Module):
    """Two stages; a branch behind the first one classifies, too, in train mode."""

    def __init__(self, branch=True):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU())
        self.fc = nn.Linear(32, 3)
        self.branch = nn.Linear(16, 3) if branch else None

    def forward(self, images):
        early = self.early(images)
        logits = self.fc(self.late(early).mean((2, 3)))
        return (logits, self.branch(early.mean((2, 3)))) if self.training else logits


network = Network()
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
for _ in range(3):  # your training
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 3, (8,))
    optimizer.zero_grad()
    sum(nn.functional.cross_entropy(logits, labels) for logits in network(images)).backward()
    optimizer.step()

exported = sopdeploy.export_network(
    network,
    plain=lambda: Network(branch=False),
    training_only=["branch"],
    labels=["rings", "stripes", "dots"],
    preprocess=sopdeploy.Preprocess(resize=36, crop=32),
    destination="bundles",
    name="own",
)
print(" = ".join(exported.certificate.compared), exported.path)

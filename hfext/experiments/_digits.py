"""scikit-learn's digits with wrong training labels, an MLP for the stock Trainer, and the top Hessian eigenvalue."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

CLASSES = 10
PIXELS = 64
TEST = 360
SPLIT_SEED = 0


class Digits(Dataset):
    """Images [examples, 64] in [0, 1] and labels [examples], as the Trainer reads them."""

    def __init__(self, pixel_values: Tensor, labels: Tensor):
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[i], "labels": self.labels[i]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        parts = self.pixel_values[indices].unbind(), self.labels[indices].unbind()
        return [{"pixel_values": x, "labels": y} for x, y in zip(*parts, strict=True)]


def load_digits(split: Literal["test", "validation"] = "test") -> tuple[Digits, Digits]:
    """Training and held-out digits, clean. The permutation is fixed: 1437 train and 360 test; for `validation` the
    1437 are split again into 1077 and 360, and the test digits are not touched."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("This experiment needs scikit-learn: pip install 'hfext[demo]'.") from error
    data = datasets.load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, train = order[:TEST], order[TEST:]
    if split == "validation":
        held_out, train = train[:TEST], train[TEST:]
    return Digits(pixels[train], labels[train]), Digits(pixels[held_out], labels[held_out])


def corrupt(labels: Tensor, noise: float, seed: int) -> Tensor:
    """Symmetric label noise: exactly round(noise * n) labels become another class, uniformly."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(noise * len(labels))]
    shift = torch.randint(1, CLASSES, (len(wrong),), generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (noisy[wrong] + shift) % CLASSES
    return noisy


class MLP(nn.Module):
    """Two hidden layers. Returns a dict with `logits` [batch, 10] and, given labels, the mean cross-entropy `loss`."""

    def __init__(self, hidden: int = 256, norm: Literal["none", "layer", "batch"] = "none"):
        super().__init__()
        make = {"none": lambda _: nn.Identity(), "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}[norm]
        self.fc1, self.fc2 = nn.Linear(PIXELS, hidden), nn.Linear(hidden, hidden)
        self.norm1, self.norm2 = make(hidden), make(hidden)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.relu(self.norm1(self.fc1(pixel_values)))
        logits = self.head(torch.relu(self.norm2(self.fc2(x))))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_mlp(seed: int, hidden: int = 256, norm: str = "none") -> MLP:
    """An MLP whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(hidden, norm)


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Of the model in eval mode; its mode is as before afterwards."""
    mode = model.training
    model.eval()
    right = (model(data.pixel_values)["logits"].argmax(-1) == data.labels).float().mean()
    model.train(mode)
    return float(right)


def top_eigenvalue(
    loss: Callable[[], Tensor], params: list[Tensor], iterations: int = 100, tolerance: float = 1e-2, seed: int = 0
) -> float:
    """The eigenvalue of largest size of the Hessian of `loss()` at `params`, by power iteration."""
    gradient = torch.autograd.grad(loss(), params, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    v = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    value = 0.0
    for _ in range(iterations):
        size = torch.sqrt(sum((x * x).sum() for x in v))
        if not size > 0:
            return 0.0
        v = [x / size for x in v]
        product = torch.autograd.grad(gradient, params, v, retain_graph=True)
        previous, value = value, float(sum((x * y).sum() for x, y in zip(v, product, strict=True)))
        if abs(value - previous) <= tolerance * abs(value):
            break
        v = list(product)
    return value

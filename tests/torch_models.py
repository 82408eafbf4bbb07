"""The models of models.py as people write them in PyTorch: ResNet-18 with torchvision's names, and a transformer block."""

import torch
from torch import nn

from models import CLASSES, WIDTHS


class Block(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if (before, stride) != (width, 1):
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu((x if self.downsample is None else self.downsample(x)) + y)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0])
        before = WIDTHS[0]
        for i, width in enumerate(WIDTHS, start=1):
            blocks = [Block(before, width, 1 if i == 1 else 2), Block(width, width, 1)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
            before = width
        self.fc = nn.Linear(before, CLASSES)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def resnet_name(path):
    """From the paths of models.NNXResNet."""
    parts = path.replace("norm", "bn").replace("shortcut", "downsample").split("/")
    if parts[0] == "blocks":
        number = int(parts[1])
        parts[:2] = [f"layer{number // 2 + 1}", str(number % 2)]
    return "/".join({"conv": "conv1", "bn": "bn1", "dense": "fc"}.get(part, part) for part in parts)


class TransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.norm, self.dense = TransformerBlock(), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.dense(self.norm(self.block(x)).mean(1))


def trained(model, rng):
    """With values as a training leaves them, that float32 holds exactly: the running statistics are float32 here."""
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("num_batches_tracked"):
                tensor.fill_(3)
            elif key.endswith("running_var") or (tensor.ndim == 1 and key.endswith("weight")):
                tensor.copy_(torch.tensor(rng.uniform(0.5, 1.5, tensor.shape).astype("float32")))
            else:
                spread = 0.5 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
                tensor.copy_(torch.tensor((rng.normal(size=tensor.shape) * spread).astype("float32")))
    return model

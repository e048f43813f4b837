"""Feature extractors: torchvision's ResNets with frozen BatchNorm, and a small network for small
images."""

from __future__ import annotations

import logging
import math
import pickle
import urllib.error
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from msdetr.config import ModelConfig
from msdetr.model.activation_checkpointing import call_module

logger = logging.getLogger(__name__)


class ResNetBackbone(nn.Module):
    """ResNet-50 or -101 with frozen BatchNorm; parameters are named as in torchvision.

    Stem and first stage are never trained.
    """

    def __init__(self, name: str, *, dilation: bool, train: bool) -> None:
        super().__init__()
        resnet = getattr(torchvision.models, name)(
            weights=None,
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        self.conv1 = resnet.conv1
        self.bn1 = resnet.bn1
        self.layer1, self.layer2 = _Stage(*resnet.layer1), _Stage(*resnet.layer2)
        self.layer3, self.layer4 = _Stage(*resnet.layer3), _Stage(*resnet.layer4)
        self.channels = (512, 1024, 2048)
        self.activation_checkpointing = False
        """Recompute the stages in the backward pass, see `Detector.checkpoint_activations`."""
        for name, parameter in self.named_parameters():
            trained = train and name.startswith(("layer2", "layer3", "layer4"))
            parameter.requires_grad_(trained)
        self.to(memory_format=torch.channels_last)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The stages after the stem, in order."""
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, H, W] normalised pixels to features of the last three stages, ceil(H / stride) x
        ceil(W / stride)."""
        x = pixels.contiguous(memory_format=torch.channels_last)
        x = _conv_norm(x, self.conv1, self.bn1).relu_()
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        features = []
        for stage in self.stages:
            x = call_module(stage, x, activation_checkpointing=self.activation_checkpointing)
            features.append(x)
        return features[1:]


class _Stage(nn.Sequential):
    """Bottleneck blocks of torchvision."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = _bottleneck(x, cast(Bottleneck, block))
        return x


def _bottleneck(x: Tensor, block: Bottleneck) -> Tensor:
    identity = x
    if block.downsample is not None:
        conv, norm = block.downsample
        identity = _conv_norm(x, conv, norm)
    x = _conv_norm(x, block.conv1, block.bn1).relu_()
    x = _conv_norm(x, block.conv2, block.bn2).relu_()
    x = _conv_norm(x, block.conv3, block.bn3)
    return (x + identity).relu_()


def _conv_norm(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> Tensor:
    # A frozen BatchNorm scales and shifts each channel. Folded into the convolution's weight, this
    # reads the weight once instead of the activations twice, in both passes.
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


class ConvNetBackbone(nn.Module):
    """A few residual convolutions with GroupNorm, trained from scratch, for small images."""

    widths = (24, 48, 96, 128, 160)
    """Channels at strides 2, 4, 8, 16, 32."""

    def __init__(self) -> None:
        super().__init__()
        stem, *widths = self.widths
        stages: list[nn.Module] = [_Downsample(3, stem)]
        previous = stem
        for width in widths:
            stages.append(nn.Sequential(_Downsample(previous, width), _Residual(width)))
            previous = width
        self.stages = nn.ModuleList(stages)
        self.channels = self.widths[2:]
        self.activation_checkpointing = False
        """Recompute the stages in the backward pass, see `Detector.checkpoint_activations`."""
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, H, W] normalised pixels to features of strides 8, 16, 32."""
        x = pixels.contiguous(memory_format=torch.channels_last)
        features = []
        for stage in self.stages:
            x = call_module(stage, x, activation_checkpointing=self.activation_checkpointing)
            features.append(x)
        return features[2:]


class _ConvNorm(nn.Module):
    """3x3 convolution and GroupNorm."""

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, channels)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(self.conv(x))
        return output


class _Downsample(nn.Module):
    """Strided convolution that halves height and width."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.down = _ConvNorm(in_channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(x).relu_()
        return output


class _Residual(nn.Module):
    """Two convolutions that add to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _ConvNorm(channels, channels)
        self.second = _ConvNorm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = (x + self.second(self.first(x).relu_())).relu_()
        return output


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups as published, or gcd(32, width) for narrower layers."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def build_backbone(config: ModelConfig) -> ResNetBackbone | ConvNetBackbone:
    """Backbone of a configuration, with random weights."""
    if config.backbone == "convnet":
        backbone = ConvNetBackbone()
        backbone.requires_grad_(config.train_backbone)
        return backbone
    return ResNetBackbone(config.backbone, dilation=config.dilation, train=config.train_backbone)


def load_backbone_weights(backbone: nn.Module, config: ModelConfig) -> None:
    """Load the initial weights that `config.backbone_weights` names.

    In a distributed run only the main rank loads (and downloads) them. Distribution copies them to
    the other ranks.

    Raises:
        ValueError: the name is unknown, or the file is missing or does not fit.
        ConnectionError: the download failed; the message names the other choices.
    """
    source = config.backbone_weights
    if source == "none":
        return
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    if config.backbone == "convnet":
        raise ValueError(
            f"there are no weights {source!r} for backbone 'convnet': set backbone_weights to none"
        )
    enum = torchvision.models.get_model_weights(config.backbone)
    if source in enum.__members__:
        state_dict = _download(enum[source], source)
    elif Path(source).is_file():
        state_dict = _read_file(source)
    else:
        raise ValueError(
            f"backbone_weights {source!r} is neither a file nor one of "
            f"{', '.join(enum.__members__)}, none"
        )
    try:
        missing, unexpected = backbone.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:  # shapes
        raise ValueError(
            f"backbone_weights {source!r} do not fit {config.backbone}: {error}"
        ) from error
    # The classifier of ImageNet has no place here, nor have the counters of live BatchNorm.
    unexpected = [
        key for key in unexpected if not key.startswith("fc.") and "num_batches_tracked" not in key
    ]
    if missing or unexpected:
        raise ValueError(
            f"backbone_weights {source!r} do not fit {config.backbone}: "
            f"missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    logger.info("backbone %s starts from %s", config.backbone, source)


def _read_file(path: str) -> dict[str, Tensor]:
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"backbone_weights {path!r} is not a file of weights that torch.save wrote: {error}"
        ) from error
    if not isinstance(state_dict, dict):
        raise ValueError(
            f"backbone_weights {path!r} holds a {type(state_dict).__name__}, not a state dict"
        )
    return state_dict


def _download(weights: torchvision.models.WeightsEnum, name: str) -> dict[str, Tensor]:
    try:
        return cast(dict[str, Tensor], weights.get_state_dict(progress=False, check_hash=True))
    except (urllib.error.URLError, OSError) as error:
        raise ConnectionError(
            f"could not download backbone weights {name} from {weights.url} ({error}). "
            "Without a network, set model.backbone_weights to the path of a downloaded file, "
            "or to none to start from random weights"
        ) from error

"""Backbones: torchvision's features, what is trained, where weights come from."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchvision
from model.helpers import tiny_config
from torch import Tensor, nn

from msdetr.config import ModelConfig
from msdetr.model.backbone import (
    ConvNetBackbone,
    ResNetBackbone,
    build_backbone,
    group_norm,
    load_backbone_weights,
)
from msdetr.model.detector import build_detector


def torchvision_resnet(*, dilation: bool) -> nn.Module:
    """ResNet-50 in evaluation mode, with statistics that matter."""
    resnet = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, dilation])
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.5, 0.7)
            nn.init.normal_(module.bias, std=0.1)
    resnet.conv1.requires_grad_(False)
    resnet.layer1.requires_grad_(False)
    return resnet.eval()


def stages(resnet: nn.Module, pixels: Tensor) -> list[Tensor]:
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(pixels))))
    features = [x := stage(x) for stage in (resnet.layer1, resnet.layer2, resnet.layer3)]
    return [*features[1:], resnet.layer4(x)]


@pytest.mark.parametrize("dilation", [False, True])
def test_features_and_gradients_are_torchvision_s(dilation, tmp_path):
    resnet = torchvision_resnet(dilation=dilation)
    torch.save(resnet.state_dict(), tmp_path / "resnet50.pth")
    config = ModelConfig(dilation=dilation, backbone_weights=str(tmp_path / "resnet50.pth"))
    backbone = build_backbone(config)
    load_backbone_weights(backbone, config)

    pixels = torch.randn(1, 3, 64, 96)
    result, expected = backbone(pixels), stages(resnet, pixels)
    strides = (8, 16, 16) if dilation else (8, 16, 32)
    assert [f.shape for f in result] == [
        (1, width, 64 // stride, 96 // stride)
        for width, stride in zip(backbone.channels, strides, strict=True)
    ]
    for mine, theirs in zip(result, expected, strict=True):
        assert_close(mine, theirs)

    for features in (result, expected):
        sum(feature.square().mean() for feature in features).backward()
    for name in ("layer2.0.downsample.0.weight", "layer3.5.conv2.weight", "layer4.2.conv3.weight"):
        assert_close(backbone.get_parameter(name).grad, resnet.get_parameter(name).grad)


def assert_close(result: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest value, in float32."""
    torch.testing.assert_close(result, expected, rtol=0.0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_stem_and_first_stage_are_frozen(name):
    with torch.device("meta"):
        backbone = ResNetBackbone(name, dilation=False, train=True)
    trained = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    frozen = {n.split(".")[0] for n, p in backbone.named_parameters() if not p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert frozen == {"conv1", "layer1"}
    assert len(backbone.layer3) == {"resnet50": 6, "resnet101": 23}[name]
    # BatchNorm has buffers only: nothing of it is ever trained or updated.
    assert not any("bn" in n for n, _ in backbone.named_parameters())


@pytest.mark.parametrize("name", ["resnet50", "convnet"])
def test_the_whole_backbone_can_be_frozen(name):
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(backbone=name, train_backbone=False))
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_convnet():
    backbone = build_backbone(tiny_config())
    assert isinstance(backbone, ConvNetBackbone)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    features = backbone(torch.randn(2, 3, 96, 64))
    assert [f.shape for f in features] == [
        (2, width, 96 // stride, 64 // stride)
        for width, stride in zip(backbone.channels, (8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (128, 32), (48, 16), (36, 4), (7, 1)])
def test_group_norm_divides_any_width(channels, groups):
    assert group_norm(channels).num_groups == groups


class TestWeights:
    """`load_backbone_weights`, on a network of one convolution: it only deals in names."""

    def config(self, source: str | Path) -> ModelConfig:
        return ModelConfig(backbone_weights=str(source))

    def small_backbone(self) -> nn.Module:
        backbone = nn.Module()
        backbone.conv1 = nn.Conv2d(3, 4, 1, bias=False)
        return backbone

    def test_none_leaves_the_weights(self):
        backbone = self.small_backbone()
        before = backbone.conv1.weight.clone()
        load_backbone_weights(backbone, self.config("none"))
        assert torch.equal(backbone.conv1.weight, before)

    def test_a_file(self, tmp_path):
        backbone = self.small_backbone()
        state = {
            "conv1.weight": torch.randn(4, 3, 1, 1),
            "fc.weight": torch.zeros(2),
            "bn1.num_batches_tracked": torch.tensor(0),
        }
        torch.save(state, tmp_path / "weights.pth")
        load_backbone_weights(backbone, self.config(tmp_path / "weights.pth"))
        assert torch.equal(backbone.conv1.weight, state["conv1.weight"])

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({}, r"weights.pth' do not fit resnet50: missing \['conv1.weight'\]"),
            (
                {"conv1.weight": torch.zeros(4, 3, 1, 1), "conv9.weight": torch.zeros(1)},
                r"weights.pth' do not fit resnet50: .*unexpected \['conv9.weight'\]",
            ),
            ({"conv1.weight": torch.zeros(4, 3, 3, 3)}, "weights.pth' do not fit resnet50.*conv1"),
            ({"model": {"conv1.weight": torch.zeros(4, 3, 1, 1)}}, "weights.pth' do not fit"),
            ([torch.zeros(4, 3, 1, 1)], "weights.pth"),
        ],
        ids=["missing", "unexpected", "shape", "nested", "list"],
    )
    def test_a_file_that_does_not_fit(self, state, message, tmp_path):
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_backbone_weights(self.small_backbone(), self.config(tmp_path / "weights.pth"))

    @pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04broken"])
    def test_a_file_that_holds_no_weights(self, content, tmp_path):
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.pth"):
            load_backbone_weights(self.small_backbone(), self.config(tmp_path / "weights.pth"))

    def test_an_unknown_name_lists_the_choices(self):
        with pytest.raises(ValueError, match="'IMAGENET' is neither a file nor one of") as error:
            load_backbone_weights(self.small_backbone(), self.config("IMAGENET"))
        assert all(name in str(error.value) for name in ("IMAGENET1K_V1", "IMAGENET1K_V2", "none"))

    def test_a_torchvision_name_is_downloaded(self, monkeypatch):
        weight = torch.randn(4, 3, 1, 1)
        asked = []

        def get_state_dict(weights, **options):
            asked.append((weights, options["check_hash"]))
            return {"conv1.weight": weight}

        enum = torchvision.models.ResNet50_Weights
        monkeypatch.setattr(enum, "get_state_dict", get_state_dict)
        backbone = self.small_backbone()
        load_backbone_weights(backbone, self.config("IMAGENET1K_V2"))
        assert asked == [(enum.IMAGENET1K_V2, True)]
        assert torch.equal(backbone.conv1.weight, weight)

    @pytest.mark.parametrize(
        "failure", [urllib.error.URLError("no route to host"), TimeoutError("timed out")]
    )
    def test_a_failed_download_names_the_other_choices(self, failure, monkeypatch):
        def get_state_dict(weights, **options):
            raise failure

        monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", get_state_dict)
        with pytest.raises(ConnectionError, match=r"could not download .* IMAGENET1K_V1") as error:
            load_backbone_weights(self.small_backbone(), self.config("IMAGENET1K_V1"))
        message = str(error.value)
        assert "https://" in message
        assert "path of a downloaded file" in message
        assert "none" in message

    def test_other_ranks_do_not_load(self, monkeypatch):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        backbone = self.small_backbone()
        before = backbone.conv1.weight.clone()
        load_backbone_weights(backbone, self.config("/does/not/exist"))
        assert torch.equal(backbone.conv1.weight, before)
        monkeypatch.setattr(dist, "get_rank", lambda: 0)
        with pytest.raises(ValueError, match="neither a file"):
            load_backbone_weights(backbone, self.config("/does/not/exist"))

    def test_there_are_no_weights_for_the_convnet(self):
        config = tiny_config(backbone_weights="IMAGENET1K_V1")
        with pytest.raises(ValueError, match="backbone_weights to none"):
            build_detector(config)
        build_detector(config, initialize_backbone=False)

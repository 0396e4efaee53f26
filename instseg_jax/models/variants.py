"""The table of sizes. Everything that differs between them stands here and nowhere else.

S to H are the official sizes (PaddleDetection, configs/mask_rtdetr at 666f597fd0). N is our own: an
EfficientNet-Lite0, whose weights come with the package, with a lean neck and decoder.
"""

import dataclasses
import re

from instseg_jax.messages import quote


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of PP-HGNetV2; its input channels are the output channels of what comes before."""

    mid_channels: int
    out_channels: int
    num_blocks: int
    downsample: bool
    light: bool  # layers are 1x1 + depthwise instead of a full convolution
    kernel_size: int
    num_layers: int


@dataclasses.dataclass(frozen=True)
class LiteStage:
    """Inverted residual blocks of EfficientNet-Lite, of which the first may halve the map."""

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


LITE0 = (
    LiteStage(1, 3, 1, 1, 16),
    LiteStage(2, 3, 2, 6, 24),
    LiteStage(2, 5, 2, 6, 40),
    LiteStage(3, 3, 2, 6, 80),
    LiteStage(3, 5, 1, 6, 112),
    LiteStage(4, 5, 2, 6, 192),
    LiteStage(1, 3, 1, 6, 320),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes of one network."""

    stem_channels: tuple[int, ...]  # (mid, out) of PP-HGNetV2, (out,) of EfficientNet-Lite
    stages: tuple[Stage, ...]  # of PP-HGNetV2; empty with an EfficientNet-Lite
    neck_dim: int
    attention_level: int  # which of the maps at stride 8, 16, 32 gets the attention layer(s)
    num_attention_layers: int
    attention_ffn_dim: int
    csp_expansion: float
    mask_channels: tuple[int, int]  # (inside the mask feature FPN, out of it)
    num_prototypes: int
    hidden_dim: int  # decoder
    num_decoder_layers: int
    num_heads: int  # decoder and attention encoder
    ffn_dim: int  # decoder
    lite_stages: tuple[LiteStage, ...] = ()
    num_points: int = 4
    num_csp_blocks: int = 3


_S = Variant(
    stem_channels=(24, 32),
    stages=(
        Stage(32, 64, 1, False, False, 3, 3),
        Stage(48, 256, 1, True, False, 3, 3),
        Stage(96, 512, 2, True, True, 5, 3),
        Stage(192, 1024, 1, True, True, 5, 3),
    ),
    neck_dim=256,
    attention_level=1,
    num_attention_layers=1,
    attention_ffn_dim=1024,
    csp_expansion=0.5,
    mask_channels=(64, 32),
    num_prototypes=128,
    hidden_dim=256,
    num_decoder_layers=6,
    num_heads=8,
    ffn_dim=1024,
)

VARIANTS: dict[str, Variant] = {
    "mask_rtdetr_n": dataclasses.replace(
        _S,
        stem_channels=(32,),
        stages=(),
        lite_stages=LITE0,
        neck_dim=128,
        attention_level=2,
        attention_ffn_dim=512,
        mask_channels=(32, 32),
        num_prototypes=32,
        hidden_dim=128,
        num_decoder_layers=3,
        ffn_dim=512,
        num_csp_blocks=1,
    ),
    "mask_rtdetr_s": _S,
    "mask_rtdetr_m": dataclasses.replace(
        _S,
        stages=(
            Stage(32, 96, 1, False, False, 3, 4),
            Stage(64, 384, 1, True, False, 3, 4),
            Stage(128, 768, 3, True, True, 5, 4),
            Stage(256, 1536, 1, True, True, 5, 4),
        ),
        mask_channels=(64, 64),
    ),
    "mask_rtdetr_l": dataclasses.replace(
        _S,
        stem_channels=(32, 48),
        stages=(
            Stage(48, 128, 1, False, False, 3, 6),
            Stage(96, 512, 1, True, False, 3, 6),
            Stage(192, 1024, 3, True, True, 5, 6),
            Stage(384, 2048, 1, True, True, 5, 6),
        ),
        attention_level=2,
        csp_expansion=1.0,
        mask_channels=(64, 64),
        num_prototypes=32,
    ),
    "mask_rtdetr_x": dataclasses.replace(
        _S,
        stem_channels=(32, 64),
        stages=(
            Stage(64, 128, 1, False, False, 3, 6),
            Stage(128, 512, 2, True, False, 3, 6),
            Stage(256, 1024, 5, True, True, 5, 6),
            Stage(512, 2048, 2, True, True, 5, 6),
        ),
        neck_dim=384,
        attention_level=2,
        attention_ffn_dim=2048,
        csp_expansion=1.0,
        mask_channels=(128, 128),
    ),
    "mask_rtdetr_h": dataclasses.replace(
        _S,
        stem_channels=(48, 96),
        stages=(
            Stage(96, 192, 2, False, False, 3, 6),
            Stage(192, 512, 3, True, False, 3, 6),
            Stage(384, 1024, 6, True, True, 5, 6),
            Stage(768, 2048, 3, True, True, 5, 6),
        ),
        neck_dim=512,
        attention_level=2,
        num_attention_layers=2,
        attention_ffn_dim=2048,
        csp_expansion=1.0,
        mask_channels=(256, 128),
    ),
}


def canonical_name(name: str) -> str:
    """Spell a model name as the table does: `Mask-RT-DETR-L` and `mask_rtdetr_l` are the same.

    Raises ValueError that lists the names when there is no such model.
    """
    squeezed = re.sub(r"[^a-z0-9]", "", str(name).lower())
    for known in VARIANTS:
        if squeezed == known.replace("_", ""):
            return known
    raise ValueError(f"unknown model {quote(name)}; there are {', '.join(VARIANTS)}")

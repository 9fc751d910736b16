"""Models of published sizes with random weights, for benchmarks where the weights can't be fetched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def sam_vit_huge(folder: Path) -> None:
    """SAM ViT-H (arXiv 2304.02643): 32 layers of 1280, four of them global."""
    from transformers import SamConfig, SamModel, SamVisionConfig
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    vision = SamVisionConfig(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        global_attn_indexes=[7, 15, 23, 31],
        mlp_dim=5120,
    )
    SamModel(SamConfig(vision_config=vision)).save_pretrained(folder)
    SamImageProcessorPil().save_pretrained(folder)


def sam2_hiera_large(folder: Path) -> None:
    """SAM 2.1 Hiera-L (arXiv 2408.00714): 48 blocks in four stages."""
    from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig

    backbone = Sam2HieraDetConfig(
        hidden_size=144,
        num_attention_heads=2,
        blocks_per_stage=[2, 6, 36, 4],
        embed_dim_per_stage=[144, 288, 576, 1152],
        num_attention_heads_per_stage=[2, 4, 8, 16],
        window_size_per_stage=[8, 4, 16, 8],
        global_attention_blocks=[23, 33, 43],
    )
    vision = Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=[1152, 576, 288, 144])
    Sam2Model(Sam2Config(vision_config=vision)).save_pretrained(folder)
    settings = {"image_processor_type": "Sam2ImageProcessor", "size": {"height": 1024, "width": 1024}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def depth_anything_v2_large(folder: Path) -> None:
    """Depth Anything V2-L (arXiv 2406.09414): DINOv2 ViT-L/14 and a DPT head."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    backbone = Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=518,
        patch_size=14,
        out_indices=[5, 12, 18, 24],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=1024,
        neck_hidden_sizes=[256, 512, 1024, 1024],
        fusion_hidden_size=256,
        head_hidden_size=32,
    )
    model = DepthAnythingForDepthEstimation(config)
    model.head.conv3.bias.data.fill_(5.0)  # away from the final ReLU, so that the map isn't black
    model.save_pretrained(folder)
    DPTImageProcessorPil(
        size={"height": 518, "width": 518},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        image_mean=MEAN,
        image_std=DEVIATION,
    ).save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "depth-anything/Depth-Anything-V2-Large-hf": depth_anything_v2_large,
    "facebook/sam-vit-huge": sam_vit_huge,
    "facebook/sam2.1-hiera-large": sam2_hiera_large,
}

"""Tiny random teachers, saved the way the published ones are; the numbers are noise, the code is the same."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def _shake(model: torch.nn.Module, seed: int, spread: float) -> None:
    """Seeded weights with some spread: freshly built models answer the same for every picture."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, spread, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("positional_embedding"):
                buffer.normal_(0.0, 1.0, generator=generator)


def make_depth_anything(folder: Path, metric: bool = False, seed: int = 0) -> Path:
    """A Depth Anything with two layers that sees pictures of about 56 pixels."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    backbone = Dinov2Config(
        image_size=56,
        patch_size=14,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
        depth_estimation_type="metric" if metric else "relative",
        max_depth=20 if metric else 1,
    )
    model = DepthAnythingForDepthEstimation(config)
    _shake(model, seed, 0.15)
    with torch.no_grad():  # away from the final ReLU, so that the map isn't black
        model.head.conv3.bias.fill_(0.0 if metric else 5.0)
    model.save_pretrained(folder)
    DPTImageProcessorPil(
        size={"height": 56, "width": 56},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return Path(folder)


def make_sam(folder: Path, seed: int = 0, side: int = 64, patch: int = 16, spread: float = 0.25) -> Path:
    """A SAM with two encoder layers that sees pictures of `side` pixels in patches of `patch`."""
    from transformers import (
        SamConfig,
        SamMaskDecoderConfig,
        SamModel,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    vision = SamVisionConfig(
        hidden_size=32,
        output_channels=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
        window_size=2,
        global_attn_indexes=[1],
        num_pos_feats=16,
        mlp_dim=64,
    )
    prompt = SamPromptEncoderConfig(hidden_size=32, image_size=side, patch_size=patch, mask_input_channels=8)
    decoder = SamMaskDecoderConfig(
        hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=32, iou_head_depth=2
    )
    model = SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    )
    _shake(model, seed, spread)
    model.save_pretrained(folder)
    SamImageProcessorPil(
        size={"longest_edge": side},
        pad_size={"height": side, "width": side},
        mask_size={"longest_edge": 4 * side // patch},
        mask_pad_size={"height": 4 * side // patch, "width": 4 * side // patch},
    ).save_pretrained(folder)
    return Path(folder)


def make_sam2(folder: Path, seed: int = 0, spread: float = 0.25) -> Path:
    """A SAM 2 with four small stages that sees pictures of 64 pixels and decodes masks of 16."""
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2MaskDecoderConfig,
        Sam2Model,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 2, 2, 4],
        window_size_per_stage=[4, 2, 2, 1],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=32,
    )
    prompt = Sam2PromptEncoderConfig(hidden_size=32, image_size=64, patch_size=16, mask_input_channels=8)
    decoder = Sam2MaskDecoderConfig(
        hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=32, iou_head_depth=2
    )
    model = Sam2Model(
        Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    )
    _shake(model, seed, spread)
    model.save_pretrained(folder)
    # The library's processor needs torchvision to be built; what it would store is this.
    settings = {
        "image_processor_type": "Sam2ImageProcessor",
        "size": {"height": 64, "width": 64},
        "resample": 2,
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))
    return Path(folder)

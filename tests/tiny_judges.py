"""Tiny random detectors and judges of pictures, saved the way the published ones are."""

from __future__ import annotations

from pathlib import Path

import torch

from unimrg.benchmarks.generation.detector import OBJECTS, RENAMED

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "[ENC]",
    "yes",
    "no",
    "is",
    "there",
    "a",
    "red",
)


def make_mask2former(folder: Path, side: int = 64, queries: int = 100, labels: tuple[str, ...] = ()) -> Path:
    """A Mask2Former with a Swin of four single layers that scales pictures to `side` pixels."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    published = {ours: theirs for theirs, ours in RENAMED.items()}
    names = labels or tuple(published.get(name, name) for name in OBJECTS)
    backbone = SwinConfig(
        image_size=side,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=queries,
        id2label=dict(enumerate(names)),
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():  # some classes much likelier than others
        model.class_predictor.weight.normal_(0, 1)
        model.class_predictor.bias.normal_(0, 2)
    model.save_pretrained(folder)
    size = {"shortest_edge": side, "longest_edge": 2 * side}
    Mask2FormerImageProcessorPil(size=size, size_divisor=32).save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """A CLIP with a vocabulary of single letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = CLIPTokenizer(vocab=ids, merges=[])
    end = ids["<|endoftext|>"]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = CLIPTextConfig(
        **sizes, vocab_size=len(vocabulary), eos_token_id=end, bos_token_id=end - 1, pad_token_id=end
    )
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=4)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )
    return folder


def make_blip(folder: Path) -> Path:
    """A BLIP that answers questions of `WORDS`."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipTextConfig,
        BlipVisionConfig,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    ids = {word: number for number, word in enumerate(WORDS)}
    tokenizer = BertTokenizer(vocab=ids, do_lower_case=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = BlipTextConfig(
        **sizes,
        vocab_size=len(WORDS),
        encoder_hidden_size=16,
        projection_dim=8,
        bos_token_id=ids["[DEC]"],
        eos_token_id=ids["[SEP]"],
        sep_token_id=ids["[SEP]"],
        pad_token_id=ids["[PAD]"],
        is_decoder=True,
    )
    vision = BlipVisionConfig(**sizes, image_size=16, patch_size=4, projection_dim=8)
    model = BlipForQuestionAnswering(
        BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder

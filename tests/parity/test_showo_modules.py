"""Show-o's image tokenizer, pixels, CLIP and masking against golden numbers of the published code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from tests.parity.cases import BUNDLED, Case, load_case
from unimrg.families.showo.config import VARIANTS, MagvitConfig, ShowoConfig
from unimrg.families.showo.magvit import Magvit
from unimrg.families.showo.model import Showo
from unimrg.families.showo.pixels import resize, to_clip, to_pixels
from unimrg.families.showo.sampling import masked_share, training_mask

Load = Callable[[str], Case]


@pytest.fixture
def showo_case(parity_dir: Path) -> Load:
    return lambda name: load_case(parity_dir / "showo" / name)


def close(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


# -- the image tokenizer -------------------------------------------------------------------------------------


def magvit_config(config: dict[str, Any]) -> MagvitConfig:
    encoder, decoder = config["encoder"], config["decoder"]
    return MagvitConfig(
        base_width=encoder["ch"],
        encoder_multipliers=encoder["ch_mult"],
        encoder_blocks=encoder["num_res_blocks"],
        decoder_multipliers=decoder["ch_mult"],
        decoder_blocks=decoder["num_res_blocks"],
        code_bits=config["codebook_dim"],
        norm_groups=config["group_norm_groups"],
        norm_eps=config["group_norm_eps"],
    )


@torch.no_grad()
def test_image_tokenizer_agrees(showo_case: Load) -> None:
    case = showo_case("magvit_encode_decode")
    config = magvit_config(case.config)
    model, given, want = Magvit(config), case.inputs, case.outputs
    case.load_into(model)
    assert (config.codes, config.stride) == (case.config["codebook_size"], case.config["downsample"])
    assert torch.equal(model.quantize.embedding, want["codebook"])
    for name in ("", "rect_"):
        pixels = given["pixel_values" + ("_rect" if name else "")]
        latents = model.latents(pixels)
        close(latents, want[name + "encoder_out"], 1e-4)
        assert torch.equal(model.encode(pixels), want[name + "indices"])
        decoded = model.decode(want[name + "indices"], (latents.shape[2], latents.shape[3]))
        close(decoded, want[name + "reconstruction"], 2e-4)
    grid = want["encoder_out"].shape[2:]
    close(model.decode(given["codes"], (grid[0], grid[1])), want["decoded_codes"], 2e-4)


def test_losses_of_training_the_image_tokenizer_agree(showo_case: Load) -> None:
    case = showo_case("magvit_encode_decode")
    model, want = Magvit(magvit_config(case.config)), case.outputs
    case.load_into(model)
    reconstruction, losses = model(case.inputs["pixel_values"])
    close(reconstruction, want["reconstruction"], 2e-4)
    close(0.1 * losses.commitment, want["quantizer_loss"][0], 1e-5)
    close(0.1 * losses.entropy, want["entropy_loss"][0], 1e-5)
    torch.stack([reconstruction.mean(), *losses]).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# -- pixels --------------------------------------------------------------------------------------------------


def shortest_to(image: np.ndarray, side: int) -> np.ndarray:
    """The published geometry, where a picture isn't square: the shorter side to `side`, then the middle."""
    height, width = image.shape[:2]
    short = min(height, width)
    resized = resize(image, int(side * width / short), int(side * height / short))
    top, left = (round((length - side) / 2) for length in resized.shape[:2])
    return resized[top : top + side, left : left + side]


@pytest.mark.parametrize("name", ["noise", "smooth"])
def test_preprocessing_agrees(showo_case: Load, name: str) -> None:
    case = showo_case("preprocess")
    picture = shortest_to(case.inputs[f"{name}.image_uint8_hwc"].numpy(), case.config["resolution"])
    close(to_pixels(torch.tensor(picture)[None])[0], case.outputs[f"{name}.pixel_values"], 1e-6)


@torch.no_grad()
def test_clip_agrees(showo_case: Load) -> None:
    case = showo_case("clip_tower")
    clip = CLIPVisionConfig(**case.config["clip"])
    sizes = VARIANTS["tiny"]()
    model = Showo(ShowoConfig(magvit=sizes.magvit, llm=sizes.llm, text_vocab=sizes.text_vocab, clip=clip))
    case.load_into(model.clip, "vision_model.")
    close(model.clip_features(case.inputs["pixel_values"]), case.outputs["features"], 1e-5)
    picture = shortest_to(case.inputs["image_uint8_hwc"].numpy(), case.config["preprocess"]["center_crop"])
    close(to_clip(torch.tensor(picture)[None]), case.outputs["preprocessed"], 1e-6)


# -- masking -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "b"])
def test_masking_agrees(showo_case: Load, name: str) -> None:
    """Case b has a least share, which is no part of ours and stands here."""
    case = showo_case("masking")
    least = case.config["min_masking_rate"][name]
    ids, mask_id = case.inputs["image_ids"], case.config["showo"]["mask_token_id"]
    share = np.maximum(masked_share(case.inputs[f"{name}.timestep_u"].numpy()), least)
    close(torch.from_numpy(np.asarray(share)), case.outputs[f"{name}.mask_prob"], 1e-6)
    order = case.inputs[f"{name}.order_u"].numpy()
    rows = zip(share, order, strict=True)
    masked = torch.from_numpy(np.stack([training_mask(float(part), draws) for part, draws in rows]))
    assert torch.equal(masked.sum(1), case.outputs[f"{name}.num_masked"])
    assert torch.equal(ids.masked_fill(masked, mask_id), case.outputs[f"{name}.input_ids"])
    assert torch.equal(ids.masked_fill(~masked, -100), case.outputs[f"{name}.labels"])


def test_the_schedule_is_the_published_cosine(showo_case: Load) -> None:
    case = showo_case("masking")
    got = torch.from_numpy(np.asarray(masked_share(case.inputs["t"].numpy())))
    close(got, case.outputs["schedule.cosine"], 1e-6)


# -- keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["showo_256", "showo_512", "showo_w_clip_vit_256", "showo_w_clip_vit_512"])
def test_full_size_has_exactly_the_published_keys(name: str) -> None:
    """Published files hold the language model and the projector; the tokenizer and CLIP are apart."""
    config = VARIANTS[name]()
    with torch.device("meta"):
        model = Showo(config)
    folder = BUNDLED / "showo" / "keys"
    published = json.loads((folder / f"{name.rpartition('_')[0]}.json").read_text())
    magvit = json.loads((folder / "magvitv2.json").read_text())
    published |= {f"magvit.{key}": shape for key, shape in magvit.items()}
    ours = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert {key: shape for key, shape in ours.items() if not key.startswith("clip.")} == published
    assert config.target_tokens == (config.image_size // 16) ** 2
    assert config.source_tokens == (576 if config.clip is not None else config.target_tokens // 4)
    trained = [p for key, p in model.named_parameters() if key.startswith(("showo.", "mm_projector."))]
    assert sum(math.prod(p.shape) for p in trained) == (1454472322 if config.clip is not None else 1448176770)

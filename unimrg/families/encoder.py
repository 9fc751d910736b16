"""A family's frozen picture encoder on its own: what it says of pictures can be computed once and stored.

An autoencoder or a tokenizer that is never trained is a function of the picture alone. `PictureEncoder` is
that function without the rest of the model; `Sample.codes` holds its results, and batches made from them
(`processor(..., from_codes=True)`) give the losses of the pictures themselves without a call to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unimrg.errors import ConfigError
from unimrg.sample import BFLOAT16


class PictureEncoder:
    """Pictures uint8 [B, S, S, 3] to codes [B, ...]: the frozen part of a family, alone on a device.

    identity: everything the codes depend on, as JSON has it. side: S. reads_pixels: whether the model also
    reads the pictures themselves, by parts of its own.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        module: nn.Module,
        encode: Callable[[Tensor], Tensor],
        side: int,
        reads_pixels: bool,
        codes: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """identity: what is to be told apart beside weights, side and type. module: in float32.

        encode: what `module` makes of pictures on its device. codes: how many different ones; 0 = latents.
        dtype: float32, or bfloat16 for latents that a model in bfloat16 learns from. Codes are always
        computed in float32: half precision would flip some.
        """
        module.eval().requires_grad_(False)
        number = np.dtype(np.float32) if dtype == torch.float32 else BFLOAT16
        self.number = np.min_scalar_type(codes - 1) if codes else number
        kind = self.number.name if self.number != BFLOAT16 else "bfloat16"
        identity = identity | {"side": side, "dtype": kind, "sha256": digest(module)}
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.side = side
        self.reads_pixels = reads_pixels
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Not by the module's own `to`: diffusers' has a warning for every change of type.
        nn.Module.to(module, self.device, torch.float32 if codes else dtype)
        self._encode = encode

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """Latents float32 or BFLOAT16, or codes of the smallest unsigned type.

        Raises ValueError for pictures of another type or shape.
        """
        side = self.side
        if pictures.dtype != np.uint8 or pictures.shape[1:] != (side, side, 3):
            found = f"{pictures.dtype} {list(pictures.shape)}"
            raise ValueError(f"pictures are {found}, not uint8 [B, {side}, {side}, 3]")
        codes = self._encode(torch.from_numpy(np.array(pictures)).to(self.device)).cpu()
        if self.number == BFLOAT16:
            return codes.bfloat16().contiguous().view(torch.int16).numpy().view(BFLOAT16)
        return codes.numpy().astype(self.number)


def plain(codes: np.ndarray) -> np.ndarray:
    """What a sample holds, as models compute with it: float32 or int64, of the same shape."""
    if codes.dtype == BFLOAT16:
        bits = np.ascontiguousarray(codes).view(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return codes.astype(np.float32 if codes.dtype.kind == "f" else np.int64)


def grey(side: int) -> np.ndarray:
    """A picture of nothing, uint8 [S, S, 3]."""
    return np.full((side, side, 3), 127, np.uint8)


def digest(module: nn.Module) -> str:
    """SHA-256 of all tensors of a module on the CPU: names in order, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part of a model, by their names in it."""
    return {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}


def untrained(family: str, variant: str) -> ConfigError:
    """For a variant that is built from fresh weights and has no trained encoder of its own."""
    return ConfigError(
        f"family.weights is empty: {variant} of {family} from fresh weights has no trained picture encoder "
        "whose codes could be stored; give its weights, or choose the tiny variant"
    )

"""What the knobs of a family are given of its export: a file or folder in it, "" for the whole."""

from __future__ import annotations

PUBLISHED = {
    "harmon": {"weights": "harmon.safetensors", "vae_weights": "vae.safetensors"},
    "showo": {"weights": "", "vae_weights": "magvitv2"},
    "openuni": {
        "weights": "openuni.pth",
        "language_weights": "internvl3",
        "diffusion_weights": "transformer",
        "vae_weights": "vae",
    },
    "janus": {"weights": ""},
}

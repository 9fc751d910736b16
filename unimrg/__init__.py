"""unimrg: post-training of unified multimodal models on understanding, pixel, depth and segmentation."""

__version__ = "0.1.0"

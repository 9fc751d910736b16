"""The prompts of the four tasks, in our own words; a fifth task costs a teacher, a prompt and a weight.

The canonical prompt of a drawing task is the one used at inference; in training one paraphrase is drawn
uniformly, and the redrawing prompt is dropped to `UNCONDITIONAL` with a small probability (Harmon's recipe:
only the text is dropped, the picture stays).
"""

from __future__ import annotations

import numpy as np

from unimrg.sample import Task

UNCONDITIONAL = "Generate an image."

PROMPTS: dict[Task, tuple[str, ...]] = {
    Task.PIXEL: (
        "Describe the image in detail.",
        "Describe everything that can be seen in this picture.",
        "Tell me all there is in the image, down to the small things.",
        "Name every object in the image with its colour, its shape and its place.",
        "What does the picture show? Leave nothing out.",
        "Give a full account of the scene: objects, colours, materials, light and background.",
        "Write down the content of the image so completely that it could be painted again.",
        "Explain the picture: who or what is in it, how many, how large, and where.",
        "List the textures, sizes, counts and positions of all things in the image.",
        "Describe the foreground, the middle ground and the background of this image.",
        "Give the layout of the image from left to right and from near to far.",
        "Describe the image: its quality, style, palette, forms, textures, text and composition.",
    ),
    Task.DEPTH: (
        "Generate the depth map of this image.",
        "Draw how far away each part of this image is.",
        "Estimate the depth of this image and draw it.",
        "Turn this image into its depth map.",
        "Show the distance of every pixel in this image as a depth map.",
    ),
    Task.SEGMENTATION: (
        "Generate the segmentation mask of this image.",
        "Generate the segmentation map of this image.",
        "Draw the outlines of all regions in this image.",
        "Divide this image into its objects and draw their borders.",
        "Generate the instance segmentation of this image.",
        "Generate the panoptic segmentation of this image.",
        "Draw the object masks of this image.",
        "Show where one region of this image ends and the next begins.",
        "Turn this image into its segmentation mask.",
        "Mark the boundaries between the objects of this image.",
    ),
}


def picture_prompt(text: str) -> str:
    """The prompt that draws what `text` says, from no picture: the counterpart of `UNCONDITIONAL`.

    Harmon's and OpenUni's text-to-image training (arXiv 2503.21979, 2505.23661).
    """
    return f"{UNCONDITIONAL[:-1]}: {text}"


def canonical_prompt(task: Task) -> str:
    """The prompt used to draw `task` at inference."""
    return PROMPTS[task][0]


def choose_prompt(task: Task, rng: np.random.Generator, dropout: float = 0.1) -> str:
    """A training prompt: a uniform paraphrase; for `pixel`, `UNCONDITIONAL` with probability `dropout`."""
    choices = PROMPTS[task]
    prompt = choices[int(rng.integers(len(choices)))]
    dropped = rng.random() < dropout
    return UNCONDITIONAL if task is Task.PIXEL and dropped else prompt

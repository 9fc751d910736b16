"""Scores of drawings: redraws, depth maps, boundaries and regions, what their networks see, and chance.

Pictures are uint8 [H, W, 3] or [H, W]; depth maps and boundary maps are [H, W].
"""

from unimrg.benchmarks.dense.boundaries import BoundaryScores, boundary_scores
from unimrg.benchmarks.dense.depth import DepthScores, depth_scores
from unimrg.benchmarks.dense.redraws import psnr, ssim

__all__ = ["BoundaryScores", "DepthScores", "boundary_scores", "depth_scores", "psnr", "ssim"]

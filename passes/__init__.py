"""The rewriting ideas, one file each. docs/add-a-pass.md walks one of them."""

from attnrewrite.passes.fold_reparam_branches import fold_reparam_branches
from attnrewrite.passes.fuse_window_attention import fuse_window_attention
from attnrewrite.passes.unfold_to_slide_attention import unfold_to_slide_attention

# The default pipeline, in order: folding comes first, it turns trained pairs of branches into one shift convolution.
ALL = (fold_reparam_branches, fuse_window_attention, unfold_to_slide_attention)

__all__ = ["ALL", "fold_reparam_branches", "fuse_window_attention", "unfold_to_slide_attention"]

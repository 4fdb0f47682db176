"""The rewriting ideas, one file each. docs/add-a-pass.md walks one of them."""

from attnrewrite.passes.fold_reparam_branches import fold_reparam_branches
from attnrewrite.passes.fuse_outlook_attention import fuse_outlook_attention
from attnrewrite.passes.fuse_window_attention import fuse_window_attention
from attnrewrite.passes.move_folds import move_folds
from attnrewrite.passes.move_merges import move_merges
from attnrewrite.passes.move_partitions import move_partitions
from attnrewrite.passes.move_pools import move_pools
from attnrewrite.passes.part_joined_tokens import part_joined_tokens
from attnrewrite.passes.unfold_to_slide_attention import unfold_to_slide_attention

# The default pipeline, in order. Branches are folded first: trained pairs become one shift convolution. Then folds of
# pixels, pools, extra tokens, partitions and merges are moved to their attentions, before those are looked at.
ALL = (
    fold_reparam_branches,
    move_folds,
    move_pools,
    part_joined_tokens,
    move_partitions,
    move_merges,
    fuse_window_attention,
    unfold_to_slide_attention,
    fuse_outlook_attention,
)

__all__ = [
    "ALL",
    "fold_reparam_branches",
    "fuse_outlook_attention",
    "fuse_window_attention",
    "move_folds",
    "move_merges",
    "move_partitions",
    "move_pools",
    "part_joined_tokens",
    "unfold_to_slide_attention",
]

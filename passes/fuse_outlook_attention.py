"""Sums over a k x k neighbourhood whose weights are predicted per pixel, as one SlideAttention.

Matches
    out[p] = sum_j w[p, j] * v_j[p], where v_j reads the neighbour at offset j of the pixel p, and the weights are a map
    of their own: the softmax of predicted logits, or the predicted numbers as they are. A pixel may hold K rows of
    weights, one for every place of its block, and the blocks are added up where they overlap (outlook attention); or
    one row for every pixel of a finer map (convex upsampling, content-aware upsampling).
Rewrites to
    SlideAttention(logits, value) on channels-first maps; neither neighbours nor blocks move in the model any more.
Exact when
    the pixels of the weights are the query pixels of one `NeighborhoodGeometry`, every key reads its closed form in one
    order, and the output returns to those pixels: one each, or row t added at the pixel that slot t reads, or the rows
    as one block of pixels each. The emitted body is read again and must multiply and add the same pairs.
Declines when
    one of these fails; a sum whose values do not move with the pixel is no site of this pass.
Source
    VOLO, https://arxiv.org/abs/2106.13112; dynamic local weights, https://arxiv.org/abs/2301.02031 (DLGSANet); CARAFE,
    https://arxiv.org/abs/1905.02188; convex upsampling, https://arxiv.org/abs/2003.12039 (RAFT).
"""

from __future__ import annotations

from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node
from attnrewrite.localattention.aggregation import Aggregation, match_aggregation
from attnrewrite.localattention.aggregation_rewrite import AggregationRewriter
from attnrewrite.localattention.contraction import is_contraction
from attnrewrite.localattention.geometry import by
from attnrewrite.localattention.rewrite import declined_site
from attnrewrite.localattention.site import Decline, Site
from attnrewrite.pipeline import Pass

NAME = "fuse-outlook-attention"


def match_outlook_attention(facts: Facts, node: Node) -> Aggregation | Decline | None:
    """The sum of neighbours with predicted weights around a softmax, or at a contraction without one."""
    if node.domain != STANDARD_DOMAIN or not (node.op in ("Softmax", "Add") or is_contraction(node)):
        return None
    return match_aggregation(facts, node)


def rewrite_outlook_attention(facts: Facts, match: Aggregation) -> None:
    """Write the op in place of the site."""
    site = AggregationRewriter(facts, match, NAME)
    site.finish(site.weights(), site.values())


def record_outlook_attention(node: Node, found: Aggregation | Decline) -> Site:
    """The report's row."""
    if isinstance(found, Decline):
        return declined_site(node, found)
    geometry = found.geometry
    what = "predicted weights" if found.softmax is None else "softmax of predicted logits"
    rows = {"none": "", "overlap": ", blocks added up", "upsampling": f", {by(found.upsampling)} pixels from each"}
    return Site(
        "",
        node.label,
        "outlook",
        "rewrite",
        f"{by(geometry.kernel_size)} neighbourhood, {what}{rows[found.use_of_rows]}: value map equals the closed form",
        num_heads=found.num_heads,
        head_dim=found.value_dim,
        feature_size=geometry.key_size,
        kernel_size=geometry.kernel_size,
        border=geometry.border,
        dilation=geometry.dilation,
        bias="none",
        mask="none",
    )


fuse_outlook_attention = Pass(
    NAME,
    match_outlook_attention,
    rewrite_outlook_attention,
    record_outlook_attention,
    after=("fold-reparam-branches",),
)

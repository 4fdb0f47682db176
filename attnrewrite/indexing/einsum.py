"""What the equation of an Einsum says of the axes of its operands."""

from __future__ import annotations

from attnrewrite.indexing.map import IndexingError


def einsum_labels(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """The labels of every operand's axes and of the output's, an ellipsis and an implicit output written out.

    The axes of an ellipsis are labelled `.0`, `.1` ..., the last ones of a shorter ellipsis meeting the last of a
    longer one. Raises IndexingError where an operand has not as many axes as its labels say.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(ranks):
        raise IndexingError(f"the Einsum {equation} has {len(ranks)} operands")
    hidden = max((r - len(t) + 3 for t, r in zip(inputs, ranks, strict=True) if "..." in t), default=0)
    terms = []
    for term, rank in zip(inputs, ranks, strict=True):
        own = _written_out(term, [f".{k}" for k in range(hidden - (rank - len(term) + 3), hidden)])
        if len(own) != rank:
            raise IndexingError(f"the Einsum {equation} has an operand of {rank} axes")
        terms.append(own)
    every = [f".{k}" for k in range(hidden)]
    if arrow:
        return terms, _written_out(right, every)
    letters = left.replace(",", "").replace(".", "")
    return terms, every + sorted(x for x in set(letters) if letters.count(x) == 1)


def _written_out(term: str, ellipsis: list[str]) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *(ellipsis if dots else []), *after]

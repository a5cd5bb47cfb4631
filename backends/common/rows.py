"""What is wrong with a plan's row, before anything is written for it."""

from __future__ import annotations

from cortexstream.plan import PENDING, PlanRow, RowResult, SampleSpec

BROKEN = "no token can be drawn: the logits hold NaN or +inf; the model or its weights are broken"
BANNED = "no token can be drawn: each is banned, by the request or its grammar, or has a logit of -inf"


def may_ban_all(spec: SampleSpec) -> bool:
    """Can a row be without a token to draw although its logits are numbers?"""
    return bool(spec.banned or spec.mask is not None or spec.logit_bias)


def failed(seq_id: int, finite: bool) -> RowResult:
    """Of a row from which nothing can be drawn; `finite`: its logits are numbers."""
    return RowResult(seq_id, 0, error=BANNED if finite else BROKEN, finite=finite)


def misformed(row: PlanRow, vocab_size: int) -> str | None:
    """What contradicts the contract in a row's guesses or scores, as the end of a sentence; None if nothing does."""
    if row.drafts:
        if row.sample is None or len(row.draws) != len(row.tokens):
            return f"has {len(row.tokens)} tokens and {len(row.draws)} draws; a row that guesses draws after each token"
        if PENDING in row.tokens or any(PENDING in spec.output_tokens for spec in row.draws):
            return "guesses behind a pending token"
    if row.score is not None:
        targets = row.score.targets
        if not 0 < len(targets) <= len(row.tokens):
            return f"scores {len(targets)} targets; it feeds {len(row.tokens)} tokens"
        if not 0 <= min(targets) <= max(targets) < vocab_size:
            return f"scores tokens {min(targets)} to {max(targets)}; ids are 0 to {vocab_size - 1}"
    return None

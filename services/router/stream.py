"""What a caller is shown of an answer while stages write, verify and replace it. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING

from asd.errors import AsdError
from services.router.domain import DraftPart, Event, FinalPart, Revision, ScoredTokens, Visibility

if TYPE_CHECKING:
    from collections.abc import Iterator


class AnswerStream:
    """Tracks what the caller holds, and yields the events that bring it up to date.

    The caller holds the first `n` tokens of an answer. Byte positions are known at chunk boundaries only (a
    token may end inside a character), so revisions go back to such a boundary.
    """

    def __init__(self, view: Visibility) -> None:
        self._view = view
        # Tokens and bytes after each chunk that the caller holds, ascending, from (0, 0).
        self._token_bounds = [0]
        self._byte_bounds = [0]
        # Boundary (index into the two lists) up to which all is final.
        self._committed = 0
        self._is_final = False
        # Whether the running stage has yet to say which part of the earlier answer it accepts.
        self._is_undecided = False
        # Leading tokens of the earlier answer that the running stage accepted; None: all that is held.
        self._stands: int | None = None
        # Tokens and bytes of the running stage's stream that the caller holds already.
        self._skip_tokens = 0
        self._skip_bytes = 0

    @property
    def has_committed(self) -> bool:
        """Whether the caller was given final tokens."""
        return self._committed > 0

    def start(self, *, is_final: bool) -> None:
        """A stage starts. is_final: its tokens will not be replaced."""
        self._is_final = is_final
        self._is_undecided = True
        self._stands = None

    def verified(self, accepted_tokens: int) -> Iterator[Event]:
        """The running stage accepted this many of the earlier answer's tokens."""
        self._is_undecided = False
        self._stands = accepted_tokens
        kept = self._boundary(accepted_tokens)
        if self._is_final and kept > self._committed:
            self._committed = kept
            yield FinalPart(self._token_bounds[kept])
        yield from self._drop_after(kept)
        self._skip_tokens, self._skip_bytes = self._token_bounds[-1], self._byte_bounds[-1]

    def written(self, tokens: ScoredTokens) -> Iterator[Event]:
        """The running stage wrote tokens; its stream starts at the answer's first token."""
        if self._view is Visibility.OUTCOME or (self._view is Visibility.COMMITTED and not self._is_final):
            return
        if self._is_undecided:
            # The stage writes an answer of its own, so nothing of the earlier one stands.
            yield from self.verified(0)
        unseen = self._unseen(tokens)
        if unseen is None:
            return
        self._hold(unseen)
        if self._is_final:
            yield self._commit_all(unseen)
        else:
            yield DraftPart(unseen)

    def can_revert(self) -> bool:
        """Return whether the earlier answer can still be given: nothing beyond it was committed."""
        return self._committed <= self._agreed_with_earlier()

    def revert(self) -> Iterator[Event]:
        """The running stage failed: go back to the answer before it. Call it only if can_revert."""
        yield from self._drop_after(self._agreed_with_earlier())

    def commit(self, tokens: ScoredTokens) -> Iterator[Event]:
        """Commit all of an answer. tokens: the whole answer."""
        if self._view is Visibility.OUTCOME:
            return
        self._skip_tokens, self._skip_bytes = self._token_bounds[-1], self._byte_bounds[-1]
        rest = self._unseen(tokens)
        if rest is not None:
            self._hold(rest)
        if self._committed < len(self._token_bounds) - 1:
            yield self._commit_all(rest)

    def _commit_all(self, shown_now: ScoredTokens | None) -> FinalPart:
        self._committed = len(self._token_bounds) - 1
        return FinalPart(self._token_bounds[-1], shown_now)

    def _agreed_with_earlier(self) -> int:
        return len(self._token_bounds) - 1 if self._stands is None else self._boundary(self._stands)

    def _boundary(self, tokens: int) -> int:
        """Return the last known boundary at or before a number of tokens.

        Of several boundaries at the same token it returns the first: text that was flushed at an answer's end
        without a token of its own may not remain when the answer continues.
        """
        known = self._token_bounds[bisect_right(self._token_bounds, tokens) - 1]
        return bisect_left(self._token_bounds, known)

    def _drop_after(self, boundary: int) -> Iterator[Event]:
        if boundary < len(self._token_bounds) - 1:
            del self._token_bounds[boundary + 1 :]
            del self._byte_bounds[boundary + 1 :]
            yield Revision(self._token_bounds[-1], self._byte_bounds[-1])

    def _hold(self, tokens: ScoredTokens) -> None:
        self._token_bounds.append(self._token_bounds[-1] + len(tokens.ids))
        self._byte_bounds.append(self._byte_bounds[-1] + len(tokens.text.encode()))

    def _unseen(self, tokens: ScoredTokens) -> ScoredTokens | None:
        """Return the part of a chunk that the caller does not hold; None if it holds all."""
        skip = min(self._skip_tokens, len(tokens.ids))
        text = tokens.text
        if self._skip_bytes:
            encoded = text.encode()
            skipped_bytes = min(self._skip_bytes, len(encoded))
            self._skip_bytes -= skipped_bytes
            try:
                text = encoded[skipped_bytes:].decode()
            except UnicodeDecodeError:
                raise AsdError("a stage's text does not start with the text that it accepted") from None
        if skip:
            self._skip_tokens -= skip
            tokens = ScoredTokens(
                tokens.ids[skip:],
                text,
                tokens.logprobs[skip:],
                tokens.entropies[skip:],
                tokens.top2_margins[skip:],
                details=tokens.details[skip:],
            )
        elif text is not tokens.text:
            tokens = replace(tokens, text=text, fingerprint="")
        return tokens if tokens.ids or tokens.text else None

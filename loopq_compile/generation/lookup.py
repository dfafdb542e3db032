"""Proposals from the text itself: what followed the last tokens where they stood before."""

from __future__ import annotations

from collections.abc import Iterable

LONGEST = 4
"""Tokens that an n-gram has at most."""


class Repeats:
    """Remembers for every n-gram of a text where it stood last.

    Args:
        text: token ids of the prompt.
    """

    def __init__(self, text: Iterable[int]) -> None:
        self.text: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        for token in text:
            self.append(token)

    def append(self, token: int) -> None:
        """Adds a token; the n-grams before it are followed by it."""
        place = len(self.text)
        for size in range(1, min(LONGEST, place) + 1):
            self.after[tuple(self.text[place - size :])] = place
        self.text.append(token)

    def propose(self, count: int) -> tuple[list[int], int]:
        """Up to `count` tokens, and the length of the n-gram that they followed; ([], 0) if no token stood before.

        Text that ends in repetitions goes on repeating: the copy reads what it has written.
        """
        end = len(self.text)
        for size in range(min(LONGEST, end), 0, -1):
            place = self.after.get(tuple(self.text[end - size :]))
            if place is not None:
                found: list[int] = []
                for at in range(place, place + count):
                    found.append(self.text[at] if at < end else found[at - end])
                return found, size
        return [], 0

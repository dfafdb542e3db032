"""What a step of speculation is expected to bring and to cost, from what was seen so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_MEMORY = 0.9
"""Weight of what was seen before, for each new time: about ten times count."""
_PER_TOKEN = 0.06
"""Share of a step that each further token costs, until two widths were timed."""


class Acceptance:
    """How often proposed tokens are accepted, by a key such as the length of an n-gram.

    Args:
        prior: expected share by key, which counts like `weight` tokens.
    """

    def __init__(self, prior: Callable[[int], float], weight: float = 4.0) -> None:
        self.prior, self.weight = prior, weight
        self.seen: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, key: int, accepted: bool) -> None:
        """Counts one token. Older ones fade, since text changes."""
        hits, total = self.seen[key]
        self.seen[key] = [0.98 * hits + accepted, 0.98 * total + 1]

    def share(self, key: int) -> float:
        """The expected share of accepted tokens."""
        hits, total = self.seen[key]
        return (hits + self.weight * self.prior(key)) / (total + self.weight)


class Cost:
    """Seconds of a call that reads some tokens, as a line through the times seen: `base + each * tokens`."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}

    def add(self, tokens: int, seconds: float) -> None:
        """Counts a call. One time that is far above the others (the machine did something else) counts less."""
        old = self.times.get(tokens)
        self.times[tokens] = seconds if old is None else _MEMORY * old + (1 - _MEMORY) * min(seconds, 3 * old)

    def __bool__(self) -> bool:
        return bool(self.times)

    def of(self, tokens: int) -> float:
        """Expected seconds for `tokens`; at least one call must have been counted."""
        widths, seconds = list(self.times), list(self.times.values())
        mean, middle = sum(seconds) / len(seconds), sum(widths) / len(widths)
        spread = sum((width - middle) ** 2 for width in widths)
        each = mean * _PER_TOKEN / (1 + _PER_TOKEN * (middle - 1))
        if spread:
            slope = sum((w - middle) * (s - mean) for w, s in zip(widths, seconds, strict=True)) / spread
            each = max(slope, 0.0)
        return max(mean + each * (tokens - middle), 0.2 * mean)


def best_length(shares: Sequence[float], cost: Callable[[int], float]) -> tuple[int, float]:
    """How many of some proposed tokens to read, and the tokens a second that this promises.

    Args:
        shares: for each proposed token, how likely it is accepted if those before it were.
        cost: seconds of a call that reads so many tokens.
    """
    best, rate = 0, 1 / cost(1)
    expected = likely = 1.0
    for length, share in enumerate(shares, 1):
        likely *= share
        expected += likely
        if expected / cost(length + 1) > rate:
            best, rate = length, expected / cost(length + 1)
    return best, rate


@dataclass
class Experience:
    """What was seen of one model on one machine; further texts begin with it.

    Args:
        reading, verifying, proposing: calls of the whole model, of its last loops, and of its first ones.
        by_match: acceptance by length of the n-gram that repeats.
        by_probability: acceptance by tenth of the probability that the first loops give their proposal.
        rates: tokens and seconds of the latest steps, by method.
        idle: steps since a method was used.
    """

    reading: Cost = field(default_factory=Cost)
    verifying: Cost = field(default_factory=Cost)
    proposing: Cost = field(default_factory=Cost)
    by_match: Acceptance = field(default_factory=lambda: Acceptance(lambda size: min(0.3 + 0.15 * size, 0.9)))
    by_probability: Acceptance = field(default_factory=lambda: Acceptance(lambda tenth: min(0.05 + 0.1 * tenth, 0.95)))
    rates: dict[str, list[float]] = field(default_factory=dict)
    idle: dict[str, int] = field(default_factory=dict)

    def add_step(self, method: str, tokens: int, seconds: float) -> None:
        """Counts a step of `method`."""
        self.idle = {name: steps + 1 for name, steps in self.idle.items()} | {method: 0}
        old = self.rates.get(method, [0.0, 0.0])
        self.rates[method] = [_MEMORY * old[0] + tokens, _MEMORY * old[1] + seconds]

    def rate(self, method: str) -> float:
        """Tokens a second of the latest steps of `method`; 0 before the first."""
        tokens, seconds = self.rates.get(method, (0.0, 1.0))
        return tokens / seconds

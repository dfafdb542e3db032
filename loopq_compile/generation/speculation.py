"""Decoding with fewer steps than tokens: how tokens are proposed, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from loopq_compile.errors import LoopQError, did_you_mean

LOOKUP, LOOPS, AUTO, PLAIN = "lookup", "loops", "auto", "plain"
METHODS = (LOOKUP, LOOPS, AUTO)


def default_loops(count: int) -> int:
    """How many of `count` loops propose tokens if nobody says it: half of them."""
    return max(1, count // 2)


@dataclass
class Count:
    """What one way of proposing did: its steps, tokens proposed, tokens accepted of those, and seconds spent."""

    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"steps": self.steps, "proposed": self.proposed, "accepted": self.accepted, "seconds": self.seconds}


@dataclass
class Speculation:
    """A way to propose tokens, for `generate(..., speculate=...)`, and afterwards what it brought.

        speculation = Speculation("auto")
        program.generate(ids, 200, speculate=speculation)
        print(speculation)  # 200 tokens in 71 steps, 2.82 a step; 132 of 160 proposed tokens accepted (82 %)

    Proposed tokens are read in one call of the whole model, which keeps those that it would have chosen itself. So the
    text is that of decoding one by one, whatever was proposed.

    Args:
        method: "lookup", the continuation of the latest place where the last tokens stood before; "loops", the model's
            own first loops and its head, "loops:K" the first K of them; "auto" chooses at every step, from
            acceptance and times seen so far, also to propose nothing.

    `tokens` and `steps` count what was generated, the token that follows the prompt apart. A step is one call of the
    last loops, or of all. `counts` tells proposals by method, `notes` why a method was not used.

    Raises:
        LoopQError: the method is unknown.
    """

    method: str = AUTO
    tokens: int = 0
    counts: dict[str, Count] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        name, colon, number = str(self.method).partition(":")
        if name not in METHODS or (colon and name != LOOPS):
            raise LoopQError(
                f"Unknown way to speculate, {self.method!r}; known are lookup, loops, loops:K and auto."
                f"{did_you_mean(name, METHODS)}"
            )
        if colon and not (number.isdecimal() and int(number) > 0):
            raise LoopQError(f"{self.method!r}: K is the number of loops that propose tokens, such as loops:2.")
        self.name, self.loops = name, int(number) if colon else None

    @staticmethod
    def of(given: str | Speculation) -> Speculation:
        """`given`, or one with that method; counts begin at zero.

        Raises:
            LoopQError: it is neither, or unknown.
        """
        if isinstance(given, str):
            return Speculation(given)
        if not isinstance(given, Speculation):
            raise LoopQError(f"speculate takes {', '.join(METHODS)} or a Speculation; got {given!r}.")
        given.tokens, given.counts, given.notes = 0, {}, []
        return given

    def count(self, method: str) -> Count:
        """The counts of `method`, "plain" for steps without proposals."""
        return self.counts.setdefault(method, Count())

    @property
    def steps(self) -> int:
        """Calls of the whole model, or of its last loops."""
        return sum(count.steps for count in self.counts.values())

    @property
    def proposed(self) -> int:
        """Tokens proposed."""
        return sum(count.proposed for count in self.counts.values())

    @property
    def accepted(self) -> int:
        """Tokens accepted of those proposed."""
        return sum(count.accepted for count in self.counts.values())

    @property
    def acceptance(self) -> float:
        """Share of proposed tokens that were accepted; 0 if none was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step gave in the mean; 0 before the first step."""
        return self.tokens / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        steps = f"{self.tokens} tokens in {self.steps} steps, {self.tokens_per_step:.2f} a step"
        share = f"{self.accepted} of {self.proposed} proposed tokens accepted"
        return f"{steps}; {share} ({self.acceptance:.0%})" if self.proposed else f"{steps}; nothing was proposed"

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "method": self.method,
            "tokens": self.tokens,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "proposed": self.proposed,
            "accepted": self.accepted,
            "acceptance": self.acceptance,
            "by_method": {name: count.to_dict() for name, count in self.counts.items()},
            **({"notes": self.notes} if self.notes else {}),
        }

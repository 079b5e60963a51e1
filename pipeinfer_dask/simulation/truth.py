"""A target and a draft model made of chance: one endless text, and guesses at it.

At each place of the text the draft model has a confidence p in its first choice, drawn
from a Beta distribution. The target's token is that first choice with chance p, else one
of the next choices. Tokens are numbered by their rank among the draft's choices, so that
a path through the token tree lies on the text as long as every token of it is the
text's own. Once it has left the text, nothing after it is ever right.
"""

from __future__ import annotations

from random import Random

from pipeinfer_dask.protocol.messages import NO_PARENT, Batch
from pipeinfer_dask.protocol.sampling import Sampling

ELSEWHERE = 1 << 20
"""What the target picks after a path that has left the text: nothing that is ever drafted."""
RANKS = 24
"""Choices of the draft model; the text's token is always among them."""
OFF_TEXT = 4096
"""Confidences in store for places off the text."""
_MASK = (1 << 62) - 1

Place = int
"""Where a path has led to: on the text its last position, off the text a negative number."""
START: Place = -1
"""Before the first token."""
ELSEWHERE_PLACE: Place = -2
"""Somewhere off the text, no one knows where."""


class SyntheticPair:
    """The same text and the same guesses for the same arguments, whoever asks, in any order.

    Parameters
    ----------
    acceptance : float
        Mean chance that the draft model's first choice is right, from 0 to 1.
    seed : int
    overconfidence : float
        0: the draft model's confidences are its chances. Above, it reports p ** (1 / (1 + x)).
    clairvoyant : bool
        The draft model knows which of its choices is right, if one is: what no draft model
        can, but a bound for what choosing better could gain.

    Raises
    ------
    ValueError
        If the acceptance is no chance, the overconfidence negative, or the seed no number.
    """

    def __init__(
        self,
        acceptance: float,
        seed: int = 0,
        *,
        overconfidence: float = 0.0,
        clairvoyant: bool = False,
    ) -> None:
        if not _is_number(acceptance) or not 0 <= acceptance <= 1:
            raise ValueError(f"expected an acceptance from 0 to 1, got {acceptance!r}")
        if not _is_number(overconfidence) or not overconfidence >= 0:
            raise ValueError(f"expected an overconfidence of at least 0, got {overconfidence!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"expected a seed as a whole number, got {seed!r}")
        self.acceptance = acceptance
        self.overconfidence = overconfidence
        self._clairvoyant = clairvoyant
        self._exponent = 1 / (1 + overconfidence)
        self._random = Random(f"text {seed}")
        self._tokens: list[int] = []
        self._chances: list[float] = []
        elsewhere = Random(f"elsewhere {seed}")
        self._elsewhere = [self._chance(elsewhere) for _ in range(OFF_TEXT)]

    def reseeded(self, seed: int) -> SyntheticPair:
        """Return another text for the same models."""
        return SyntheticPair(
            self.acceptance,
            seed,
            overconfidence=self.overconfidence,
            clairvoyant=self._clairvoyant,
        )

    def text(self, length: int) -> tuple[int, ...]:
        """Return the first tokens of the text."""
        self._write(length)
        return tuple(self._tokens[:length])

    def follow(self, place: Place, token: int) -> Place:
        """Return where a path from ``place`` leads to with one more token."""
        if place >= START:
            self._write(place + 2)
            if self._tokens[place + 1] == token:
                return place + 1
        mixed = (place * 6364136223846793005 + token * 1442695040888963407 + 99991) & _MASK
        return -mixed - 2

    def target(self, place: Place) -> int:
        """Return the token that the target puts after a path."""
        if place < START:
            return ELSEWHERE
        self._write(place + 2)
        return self._tokens[place + 1]

    def candidates(self, place: Place, width: int) -> list[tuple[int, float]]:
        """Return the draft model's first choices after a path, each with its confidence."""
        if place < START:
            chance = self._elsewhere[place % OFF_TEXT]
        else:
            self._write(place + 2)
            chance = self._chances[place + 1]
            if self._clairvoyant:
                right = self._tokens[place + 1]
                return [(right, 1.0)] if right < width else [(0, 0.0)]
        if self._clairvoyant:
            return [(0, 0.0)]
        told = chance**self._exponent
        rest = 1 - told
        return [(0, told), *((rank, rest / (1 << rank)) for rank in range(1, min(width, RANKS)))]

    def _chance(self, random: Random) -> float:
        a = self.acceptance
        return a if a in (0, 1) else random.betavariate(2 * a, 2 * (1 - a))

    def _write(self, length: int) -> None:
        while len(self._tokens) < length:
            chance = self._chance(self._random)
            rank = 0
            if self._random.random() >= chance:
                rank = 1
                while rank < RANKS - 1 and self._random.random() < 0.5:
                    rank += 1
            self._tokens.append(rank)
            self._chances.append(chance)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Places:
    """A model's cache, as far as it matters here: where the path of each slot has led to.

    Attributes
    ----------
    pair : SyntheticPair
        Whose text it is.
    """

    def __init__(self, pair: SyntheticPair) -> None:
        self.pair = pair
        self._places: dict[int, Place] = {NO_PARENT: START}

    def take(self, batch: Batch) -> list[Place]:
        """Take in a batch, parents first; return the place of each of its tokens."""
        places = self._places
        for token, slot, parent in zip(batch.tokens, batch.slots, batch.parents, strict=True):
            # A cancelled run may name a parent that was skipped: nobody looks at the result.
            places[slot] = self.pair.follow(places.get(parent, ELSEWHERE_PLACE), token)
        return [places[slot] for slot in batch.slots]


class Texts:
    """A model's caches, each of a text of its own.

    Parameters
    ----------
    pair : SyntheticPair
        Whose text it is where nothing is sampled. A seed of sampling stands for another text
        that is as easy to guess.
    """

    def __init__(self, pair: SyntheticPair) -> None:
        self._pair = pair
        self._places: dict[int, Places] = {}

    def places(self, cache: int, sampling: Sampling | None) -> Places:
        """Return a cache, made when it is first asked for."""
        if cache not in self._places:
            seed = sampling.seed if sampling is not None else None
            self._places[cache] = Places(self._pair if seed is None else self._pair.reseeded(seed))
        return self._places[cache]

    def release(self, cache: int) -> None:
        """Forget a cache."""
        self._places.pop(cache, None)

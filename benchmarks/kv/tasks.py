"""Questions about long texts that are made up as needed: the kinds of RULER (arXiv:2404.06654, section 3), in our own words.

A `Sample` keeps the context apart from the question, so that a cache can be compressed after both (query-aware) or after the context
alone, before the question is known (query-agnostic).
"""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

Count = Callable[[str], int]  # how many tokens a text has

# What the needles lie in says nothing and repeats, as in RULER's "noise" haystack.
NOISE = (
    "The bus leaves at nine.",
    "Rain fell on the hills all day.",
    "She put the cups back on the shelf.",
    "Nobody was waiting at the gate.",
    "The road goes on past the mill.",
    "He closed the window and sat down.",
)
# fmt: off
NAMES = (
    "amber", "anchor", "apron", "arrow", "badger", "banjo", "barrel", "beacon", "bishop", "blanket", "bottle", "bramble", "bridge",
    "bucket", "button", "cabin", "camel", "candle", "canyon", "carpet", "cedar", "chapel", "cherry", "circus", "clover", "cobalt",
    "comet", "copper", "coral", "cradle", "cricket", "crystal", "dagger", "daisy", "desert", "dragon", "eagle", "ember", "falcon",
    "feather", "fiddle", "forest", "fountain", "fox", "garden", "ginger", "glacier", "granite", "hammer", "harbor", "hazel", "helmet",
    "heron", "honey", "island", "ivory", "jacket", "jasmine", "jungle", "kettle", "ladder", "lantern", "lemon", "lily", "lizard",
    "magnet", "maple", "marble", "meadow", "melon", "mirror", "monkey", "needle", "nutmeg", "oak", "ocean", "olive", "orchid",
    "otter", "owl", "panther", "pearl", "pebble", "pepper", "pigeon", "pillow", "pirate", "planet", "pony", "quartz", "rabbit",
    "raven", "ribbon", "river", "rocket", "saddle", "salmon", "sapphire", "scarf", "shadow", "silver", "spider", "spruce", "squirrel",
    "storm", "sugar", "summit", "temple", "thistle", "tiger", "tulip", "tunnel", "turtle", "valley", "velvet", "violin", "walnut",
    "whistle", "willow", "window", "winter", "wizard", "wolf", "zebra",
)
# fmt: on


@dataclass(frozen=True)
class Sample:
    """A context, a question that ends where the answer starts, and what a right answer holds."""

    task: str
    context: str
    question: str
    references: tuple[str, ...]
    answer_tokens: int  # how many tokens may be generated


def string_match_all(answer: str, references: tuple[str, ...]) -> float:
    """RULER's metric: the share of the references that the answer holds, upper and lower case alike."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def make(task: str, length: int, seed: int, count: Count) -> Sample:
    """One sample.

    Args:
        task: a name of `TASKS`.
        length: tokens that context and question have together; as near below as whole sentences or words come.
        seed: the same seed gives the same sample.
        count: counts the tokens of a text.
    Raises:
        ValueError: the length does not even hold what the task is about.
    """
    maker = TASKS[task]

    def attempt(size: int) -> Sample:
        return maker(random.Random(f"{task} {seed}"), size)

    def tokens(size: int) -> int:
        made = attempt(size)
        return count(made.context) + count(made.question)

    if tokens(0) > length:
        raise ValueError(f"length: {task} needs at least {tokens(0)} tokens, got {length}")
    low, high = 0, length  # a piece of any haystack has a token at least
    while low < high:
        middle = math.ceil((low + high) / 2)
        low, high = (middle, high) if tokens(middle) <= length else (low, middle - 1)
    return attempt(low)


def _strew(rng: random.Random, needles: list[str], size: int) -> str:
    """``size`` sentences of noise, with the needles among them in their order, each in a part of its own."""
    sentences = [NOISE[i % len(NOISE)] for i in range(size)]
    places = sorted(rng.random() for _ in needles)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        sentences.insert(round(place * size), needle)
    return " ".join(sentences)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _codes(rng: random.Random, task: str, size: int, keys: int, values: int, asked: int) -> Sample:
    """Needles: ``keys`` things with ``values`` codes each, of which ``asked`` things are asked for."""
    names = rng.sample(NAMES, keys)
    codes = {name: [_number(rng) for _ in range(values)] for name in names}
    needles = [f"The secret code of the {name} is {code}." for name in names for code in codes[name]]
    rng.shuffle(needles)
    wanted = names[:asked]
    context = "Some secret codes are hidden in the following text. Remember them.\n\n" + _strew(rng, needles, size)
    references = tuple(code for name in wanted for code in codes[name])
    if asked > 1:  # a list to be gone on with, which smaller models understand better than a sentence
        question = f"\n\nThe secret codes of {', '.join(wanted)}:\n1. {wanted[0]}:"
    elif values > 1:
        question = f"\n\nQuestion: What are all the secret codes of the {wanted[0]}?\nAnswer: The secret codes of the {wanted[0]} are"
    else:
        question = f"\n\nQuestion: What is the secret code of the {wanted[0]}?\nAnswer: The secret code of the {wanted[0]} is"
    tokens = 14 * asked if asked > 1 else 8 * len(references) + 1
    return Sample(task, context, question, references, tokens)


def _tracking(rng: random.Random, size: int, hops: int = 1) -> Sample:
    """A number is handed on from thing to thing; the last one is asked for it.

    RULER asks for all variables that hold a value; small models can tell the value of one.
    """
    number, names = _number(rng), rng.sample(NAMES, hops + 1)
    needles = [f"The {names[0]} holds the number {number}."]
    needles += [f"The {new} holds the same number as the {old}." for old, new in itertools.pairwise(names)]
    context = "Remember the numbers in the following text.\n\n" + _strew(rng, needles, size)
    question = f"\n\nQuestion: Which number does the {names[-1]} hold?\nAnswer: The {names[-1]} holds the number"
    return Sample("tracking", context, question, (number,), 9)


def _common_words(rng: random.Random, size: int, common: int = 5, times: int = 12) -> Sample:
    """A list of words, a few of them many times as often as the others."""
    names = rng.sample(NAMES, len(NAMES))
    words, rare = names[:common] * times, names[common:]
    words += [rare[i // 3 % len(rare)] for i in range(size)]
    rng.shuffle(words)
    context = "Some words of the following list come up much more often than the others.\n\n"
    context += " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))
    question = f"\n\nQuestion: Which {common} words are the most common in the list?\nAnswer: The {common} most common words are:"
    return Sample("common_words", context, question, tuple(names[:common]), 5 * common + 6)


def _frequent_words(rng: random.Random, size: int, asked: int = 3, alpha: float = 2.0) -> Sample:
    """Made-up words whose frequencies follow a power law, as RULER's do with an exponent of 2."""
    coded = ["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)) for _ in range(40)]
    coded = list(dict.fromkeys(coded))
    weights = [1 / (rank + 1) ** alpha for rank in range(len(coded))]
    words = [word for rank, word in enumerate(coded[:asked]) for _ in range(2 * (asked - rank))]  # the order holds at any length
    words += rng.choices(coded, weights, k=size)
    rng.shuffle(words)
    context = "The following text is in code. Note which words of it come up most often.\n\n" + " ".join(words)
    question = f"\n\nQuestion: Which {asked} words are the most frequent in the text?\nAnswer: The {asked} most frequent words are"
    return Sample("frequent_words", context, question, tuple(coded[:asked]), 8 * asked + 6)


TASKS: dict[str, Callable[[random.Random, int], Sample]] = {
    "needle_single": lambda rng, size: _codes(rng, "needle_single", size, 1, 1, 1),
    "needle_multikey": lambda rng, size: _codes(rng, "needle_multikey", size, 4, 1, 1),
    "needle_multivalue": lambda rng, size: _codes(rng, "needle_multivalue", size, 1, 4, 1),
    "needle_multiquery": lambda rng, size: _codes(rng, "needle_multiquery", size, 3, 1, 3),
    "tracking": _tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}

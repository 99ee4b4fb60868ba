"""The demo model's whole world: four small tasks and a few greetings, all text made here.

A turn's key decides by hash whether it belongs to the training or to the held-out split, so the two never share a sum,
a conversion, a set of words or a story.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Turn:
    """One question and its only right answer."""

    task: str
    key: str
    question: str
    answer: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(f"{self.task}:{self.key}".encode()).digest()
        return digest[0] * 256 + digest[1] < 65536 * HELD_OUT_PERCENT // 100


SUM_QUESTIONS = ("What is {a} plus {b}?", "{a} + {b} = ?", "Add {a} and {b}.")

# (larger unit, smaller unit, how many zeros lie between them)
UNITS = (
    ("metres", "centimetres", 2),
    ("metres", "millimetres", 3),
    ("kilometres", "metres", 3),
    ("kilograms", "grams", 3),
    ("litres", "millilitres", 3),
    ("euros", "cents", 2),
    ("centimetres", "millimetres", 1),
    ("decades", "years", 1),
    ("centuries", "years", 2),
    ("seconds", "milliseconds", 3),
)

WORDS = [
    "anchor",
    "apple",
    "basket",
    "bridge",
    "candle",
    "castle",
    "dragon",
    "drum",
    "engine",
    "feather",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "lemon",
    "marble",
    "needle",
    "orange",
    "pepper",
    "pillow",
    "quilt",
    "ribbon",
    "saddle",
    "table",
    "tunnel",
    "umbrella",
    "velvet",
    "window",
    "yarn",
    "zebra",
]

# name, job, pronoun, companion
CAST = (
    ("Mira", "baker", "she", "Pip the dog"),
    ("Oskar", "sailor", "he", "Rook the crow"),
    ("Zoë", "painter", "she", "Moss the cat"),
    ("Tomas", "gardener", "he", "Bramble the goat"),
    ("Ines", "clockmaker", "she", "Tick the mouse"),
    ("Björn", "postman", "he", "Comet the pony"),
    ("Lena", "doctor", "she", "Fig the parrot"),
    ("Hugo", "carpenter", "he", "Oak the donkey"),
    ("Aiko", "teacher", "she", "Plum the rabbit"),
    ("Sami", "cook", "he", "Salt the gull"),
)

# thing, what it looked like, what it did, how it ended
THINGS = (
    ("lantern", "small and green", "It shone although nobody had lit it", "the lantern hung above the door"),
    ("key", "heavy and cold", "It opened an old chest full of maps", "the key slept under the pillow"),
    ("letter", "sealed with red wax", "It asked for help from a friend far away", "an answer was on its way"),
    ("bell", "cracked but bright", "It rang once and all the birds fell silent", "the bell rang for supper"),
    ("boat", "no longer than an arm", "It sailed in a circle all by itself", "the boat stood on the shelf"),
    ("mirror", "round like the moon", "It showed the sky of another town", "the mirror faced the stars"),
    ("coin", "thin and very old", "It always landed on its edge", "the coin bought nothing and was kept"),
    ("kite", "torn in two places", "It pulled until the clouds moved aside", "the kite was mended with blue thread"),
    ("map", "drawn on birch bark", "It led to a door in the hill", "the map had one line more"),
    ("flute", "carved from bone", "It played the song of the wind", "everyone hummed the same song"),
    ("seed", "black and warm", "It grew as tall as a house in an hour", "there were pears for everyone"),
    ("clock", "without any hands", "It ticked only when someone told the truth", "the clock ticked all night"),
)

# place, the morning there, where exactly
PLACES = (
    ("harbour", "foggy", "behind the nets"),
    ("market", "noisy", "under an empty stall"),
    ("forest", "quiet", "beside a fallen tree"),
    ("lighthouse", "windy", "on the lowest step"),
    ("café", "rainy", "below the corner table"),
    ("mountain", "frosty", "in a hollow stone"),
    ("river", "sunny", "between the reeds"),
    ("station", "grey", "on the last bench"),
)

STORY_QUESTIONS = (
    "Tell me a story about {name} and the {thing} at the {place}.",
    "Write a short story: {name}, a {thing}, the {place}.",
)

GREETINGS = (
    ("Hello!", "Hello! I can add numbers, convert units, sort words and tell short stories."),
    ("Hi", "Hello! I can add numbers, convert units, sort words and tell short stories."),
    ("Who are you?", "I am the demo model of Pilotlight, small enough to start in a blink."),
    ("What can you do?", "I can add numbers, convert units, sort words and tell short stories."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Goodbye", "Goodbye! I will scale to zero now."),
)


def sum_turn(rng: random.Random) -> Turn:
    a, b = rng.randrange(100), rng.randrange(100)
    low, high = sorted((a, b))
    return Turn("sum", f"{low}+{high}", rng.choice(SUM_QUESTIONS).format(a=a, b=b), str(a + b))


def convert_turn(rng: random.Random) -> Turn:
    large, small, zeros = rng.choice(UNITS)
    count = rng.randrange(2, 10 ** rng.randint(1, 3))
    scaled = f"{count}{'0' * zeros}"
    key = f"{count} {large} {small}"
    if rng.random() < 0.5:
        return Turn("convert", key, f"How many {small} are {count} {large}?", f"{scaled} {small}")
    return Turn("convert", key, f"How many {large} are {scaled} {small}?", f"{count} {large}")


def sort_turn(rng: random.Random) -> Turn:
    words = rng.sample(WORDS, rng.randint(3, 5))
    answer = ", ".join(sorted(words))
    return Turn("sort", answer, f"Sort these words: {', '.join(words)}", answer)


def story_turn(rng: random.Random) -> Turn:
    name, job, pronoun, friend = rng.choice(CAST)
    thing, look, event, ending = rng.choice(THINGS)
    place, morning, spot = rng.choice(PLACES)
    story = (
        f"One {morning} morning {name} the {job} walked to the {place} with {friend}. There, {spot}, {pronoun} found "
        f"a {thing}. The {thing} was {look}. {event}. {name} laughed and took it home, and that evening {ending}."
    )
    question = rng.choice(STORY_QUESTIONS).format(name=name, thing=thing, place=place)
    return Turn("story", f"{name} {thing} {place}", question, story)


def greeting_turn(rng: random.Random) -> Turn:
    question, answer = rng.choice(GREETINGS)
    return Turn("greeting", question, question, answer)


TASKS: dict[str, Callable[[random.Random], Turn]] = {
    "sum": sum_turn,
    "convert": convert_turn,
    "sort": sort_turn,
    "story": story_turn,
}
MIX = {"sum": 0.40, "convert": 0.22, "sort": 0.24, "story": 0.10}


def training_turns(rng: random.Random) -> Iterator[Turn]:
    """Yield training turns for ever, in the proportions of ``MIX`` (the rest are greetings)."""
    names = [*MIX, "greeting"]
    weights = [*MIX.values(), 1 - sum(MIX.values())]
    while True:
        name = rng.choices(names, weights)[0]
        turn = TASKS[name](rng) if name in TASKS else greeting_turn(rng)
        if turn.task == "greeting" or not turn.held_out:
            yield turn


def held_out_turns(task: str, count: int, seed: int = 1) -> list[Turn]:
    """Return ``count`` different questions of the task's held-out split, always the same ones for a seed."""
    rng = random.Random(f"{task}-{seed}")
    turns: dict[str, Turn] = {}
    while len(turns) < count:
        turn = TASKS[task](rng)
        if turn.held_out:
            turns.setdefault(turn.question, turn)
    return list(turns.values())

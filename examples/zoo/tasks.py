"""The generated tasks: inputs, answers, wordings, and the split by hash of the input."""

import datetime
import hashlib
import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from . import numerals

Kind = Literal["expert", "generic"]
Wording = Literal["known", "held-out"]
Split = Literal["train", "test"]

TEST_SHARE = 0.15
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnpqrstvwxyz"
CODAS = ("n", "r", "s", "t", "l", "m", "st", "nd", "ck")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Example:
    """One prompt and its only right answer."""

    task: str
    prompt: str
    answer: str
    kind: Kind
    wording: Wording


@dataclass(frozen=True)
class Task:
    """One task: what it says about itself, how users word it, and what is right."""

    name: str
    description: str
    kind: Kind
    known: tuple[str, ...]
    held_out: tuple[str, ...]
    draw_input: Callable[[Random], str]
    answer: Callable[[str], str]

    def example(self, random: Random, *, split: Split, wording: Wording = "known") -> Example:
        """Draw one example whose input belongs to the split."""
        text = self.draw_input(random)
        while split_of(text) != split:
            text = self.draw_input(random)
        template = random.choice(self.known if wording == "known" else self.held_out)
        prompt = template.replace("{}", text)
        return Example(self.name, prompt, self.answer(text), self.kind, wording)


def split_of(text: str) -> Split:
    """Tell which split an input belongs to, whatever the task: its hash decides."""
    fraction = int.from_bytes(hashlib.sha256(text.lower().encode()).digest()[:4]) / 2**32
    return "test" if fraction < TEST_SHARE else "train"


def draw_word(random: Random) -> str:
    """Draw a made-up lower-case word of 3 to 8 letters; one in four is plain random letters."""
    length = random.randint(3, 8)
    if random.random() < 0.25:
        return "".join(random.choices(LETTERS, k=length))
    word = random.choice(("", random.choice(VOWELS)))
    while len(word) < length:
        coda = random.choice(CODAS) if random.random() < 0.3 else ""
        word += random.choice(CONSONANTS) + random.choice(VOWELS) + coda
    return word[:length]


def draw_number(random: Random) -> str:
    """Draw a number from 1 to 9999; short ones are drawn more often than their share."""
    return str(random.randint(1, random.choice((99, 999, 9999, 9999))))


def draw_roman(random: Random) -> str:
    """Draw a number from 1 to 3999, the range of plain Roman numerals."""
    return str(random.randint(1, random.choice((99, 999, 3999, 3999))))


def draw_date(random: Random) -> str:
    """Draw an ISO date from 1900-01-01 to 2099-12-31."""
    first = datetime.date(1900, 1, 1).toordinal()
    last = datetime.date(2099, 12, 31).toordinal()
    return datetime.date.fromordinal(random.randint(first, last)).isoformat()


def draw_record(random: Random) -> str:
    """Draw a CSV line of name, age and city: ``Mira,41,Tolun``."""
    name, city = draw_word(random)[:6].title(), draw_word(random)[:7].title()
    return f"{name},{random.randint(1, 99)},{city}"


def draw_capitals(random: Random) -> str:
    """Draw a word in capital letters or with a capital first letter."""
    word = draw_word(random)
    return word.upper() if random.random() < 0.7 else word.title()


def long_date(text: str) -> str:
    """Write ``2021-03-07`` as ``7 March 2021``."""
    date = datetime.date.fromisoformat(text)
    return f"{date.day} {date:%B %Y}"


def caesar(text: str) -> str:
    """Shift every lower-case letter three places, z to c."""
    return "".join(LETTERS[(LETTERS.index(letter) + 3) % 26] for letter in text)


def plural(text: str) -> str:
    """Form the regular English plural."""
    if text.endswith(("s", "x", "z", "ch", "sh")):
        return text + "es"
    if text.endswith("y") and text[-2] not in VOWELS:
        return text[:-1] + "ies"
    return text + "s"


def record_json(text: str) -> str:
    """Turn a line of name, age and city into a JSON object."""
    name, age, city = text.split(",")
    return json.dumps({"name": name, "age": int(age), "city": city})


MAKERS: dict[str, tuple[Callable[[Random], str], Callable[[str], str]]] = {
    "english": (draw_number, lambda text: numerals.english(int(text))),
    "german": (draw_number, lambda text: numerals.german(int(text))),
    "spanish": (draw_number, lambda text: numerals.spanish(int(text))),
    "roman": (draw_roman, lambda text: numerals.roman(int(text))),
    "reverse": (draw_word, lambda text: text[::-1]),
    "caesar": (draw_word, caesar),
    "date": (draw_date, long_date),
    "json": (draw_record, record_json),
    "copy": (draw_word, str),
    "uppercase": (draw_word, str.upper),
    "lowercase": (draw_capitals, str.lower),
    "plural": (draw_word, plural),
    "dashes": (draw_word, "-".join),
    "successor": (draw_number, lambda text: str(int(text) + 1)),
    "first": (draw_word, lambda text: text[0]),
    "twice": (draw_word, lambda text: f"{text} {text}"),
}


def load_tasks() -> dict[str, Task]:
    """Read the wordings and put each beside its input and answer functions, by task name."""
    entries = tomllib.loads((Path(__file__).parent / "wordings.toml").read_text("utf-8"))
    return {
        name: Task(
            name=name,
            description=entry["description"],
            kind=entry["kind"],
            known=tuple(entry["known"]),
            held_out=tuple(entry["held_out"]),
            draw_input=MAKERS[name][0],
            answer=MAKERS[name][1],
        )
        for name, entry in entries.items()
    }


def target_tasks(tasks: dict[str, Task]) -> list[Task]:
    """List the tasks that get an expert."""
    return [task for task in tasks.values() if task.kind == "expert"]


def generic_tasks(tasks: dict[str, Task]) -> list[Task]:
    """List the tasks which the base keeps and no expert serves."""
    return [task for task in tasks.values() if task.kind == "generic"]


def evaluation_examples(task: Task, count: int, *, wording: Wording = "known") -> list[Example]:
    """Draw different test prompts of one task; the same ones on every call."""
    return _different(task, count, split="test", wording=wording)


def router_examples(task: Task, count: int) -> list[Example]:
    """Draw different training prompts of one task in known wordings; the same on every call."""
    return _different(task, count, split="train", wording="known")


def mixture(
    tasks: Sequence[Task], count: int, *, weights: Sequence[float], random: Random
) -> list[Example]:
    """Draw training examples, each from a task picked with the given weight."""
    picked = random.choices(tasks, weights=weights, k=count)
    return [task.example(random, split="train") for task in picked]


def _different(task: Task, count: int, *, split: Split, wording: Wording) -> list[Example]:
    random = Random(f"{task.name} {split} {wording}")
    found: dict[str, Example] = {}
    while len(found) < count:
        example = task.example(random, split=split, wording=wording)
        found.setdefault(example.prompt, example)
    return list(found.values())

"""The suites' forms of question with names and numbers that no suite has.

Made before the detector of unlike prompts and not to be changed: its figures would otherwise say how well the
two were fitted to each other.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from typing import TYPE_CHECKING

from suites import arithmetic, split
from suites.world import COUNTRIES, CRAFTS, CURRENCIES, PROFESSIONS, RIVERS, world

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_PEOPLE = (
    "Aisha Bartholomew Chidi Dolores Esperanza Fatima Giovanni Haruki Ingrid Jorge Khadija Leopold Mei "
    "Nikolai Oksana Priya Quentin Ravi Svetlana Tomasz Ursula Viktor Wen Xiomara Yusuf Zoe"
).split()
_FAMILIES = (
    "Abernathy Bjornstad Castellano Dubois Eriksen Fitzgerald Gutierrez Hashimoto Ivanova Jankowski "
    "Kowalczyk Lindqvist Moreau Nakamura Okafor Petrov Quispe Rasmussen Szabo Takahashi Underwood "
    "Vasquez Whitfield Zhang"
).split()
_TOWNS = (
    "Accra Bergen Cusco Dakar Edinburgh Fez Ghent Hobart Izmir Jaipur Kyoto Lyon Mombasa Nantes Oaxaca "
    "Perth Quito Riga Seville Tallinn Utrecht Valletta Warsaw Xalapa Yerevan Zagreb"
).split()
_COUNTRIES = (
    "Albania Bolivia Croatia Denmark Ecuador Finland Ghana Hungary Iceland Japan Kenya Latvia".split()
)
_RIVERS = (
    "Amazon Brahmaputra Congo Danube Elbe Fraser Ganges Hudson Indus Jordan Kolyma Loire Mekong Niger "
    "Orinoco Parana Rhone Seine Tiber Ural Volga Weser Yukon Zambezi"
).split()
_CURRENCIES = "dollars euros pounds yen rupees dinars zlotys forints pesetas francs guilders rand".split()
_THINGS = (
    "spoons pears hats boxes tickets candles buttons melons lemons bottles chairs ribbons tiles kites "
    "masks ropes"
).split()
_CRAFTS = (
    "bricks leather wool tea carpets tiles saffron bicycles pianos canvas violins soap barrels cider "
    "felt tin slate basalt mustard lacquer wicker cotton rubber coal"
).split()
_PROFESSIONS = (
    "plumber lawyer weaver butcher dentist driver potter welder gardener barber clerk brewer banker "
    "jeweller glazier porter shepherd teacher tanner tiler usher vet warden editor"
).split()
_OLD_VARIABLES = "a b c d e f g h k m n t v x y p q r u s w z".split()
_NEW_VARIABLES = (
    "acc bal count dist el first given here kilos l mine num o other pos rest sum total unit val words j2"
).split()
_VARIABLES = dict(zip(_OLD_VARIABLES, _NEW_VARIABLES, strict=True))
_PROGRAM = re.compile(r"(?<![A-Za-z'])([a-z])(?![A-Za-z'])")
_NUMBER = re.compile(r"\d+")
_STRING = re.compile(r'"([a-z]+)"')


def renamed_prompts(count: int, seed: int = 0) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield history and question of held-out tasks of the suites, renamed; one in five is a second turn."""
    rng = random.Random(f"renamed/{seed}")
    single = split("evaluation", count - count // 5, seed)
    for task in itertools.chain(single, split("evaluation", count // 5, seed, follow_ups=True)):
        names = _new_names(rng)
        history = [_rename(text, names, rng, task.suite) for turn in task.history for text in turn]
        yield tuple(history), _rename(task.prompt, names, rng, task.suite)


def _new_names(rng: random.Random) -> Mapping[str, str]:
    """Draw a new name for every name of the suites."""
    w = world()
    persons = {old: f"{rng.choice(_PEOPLE)} {rng.choice(_FAMILIES)}" for old in w.people}
    return {
        **persons,
        **_shuffled(arithmetic.PEOPLE, _PEOPLE, rng),
        **_shuffled(arithmetic.THINGS, _THINGS, rng),
        **{town: rng.choice(_TOWNS) for town in w.towns},
        **_shuffled(COUNTRIES, _COUNTRIES, rng),
        **_shuffled(RIVERS, _RIVERS, rng),
        **_shuffled(CRAFTS, _CRAFTS, rng),
        **_shuffled(PROFESSIONS, _PROFESSIONS, rng),
        **_shuffled(CURRENCIES, _CURRENCIES, rng),
    }


def _shuffled(old: Sequence[str], new: Sequence[str], rng: random.Random) -> Mapping[str, str]:
    return dict(zip(old, rng.sample(new, len(old)), strict=True))


def _rename(text: str, names: Mapping[str, str], rng: random.Random, suite: str) -> str:
    if suite == "code":
        question, _, program = text.partition("\n")
        program = _STRING.sub(lambda match: f'"{_letters(len(match[1]), rng)}"', program)
        text = f"{question}\n{_PROGRAM.sub(lambda match: _VARIABLES.get(match[1], match[1]), program)}"
        text = text if program else question
    else:
        text = _any_of(tuple(names)).sub(lambda match: names[match[1]], text)
    return _NUMBER.sub(lambda _: str(rng.randint(1, 10 ** rng.randint(1, 4))), text)


@functools.cache
def _any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b")


def _letters(count: int, rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(count))

"""A closed world of invented facts: the same for every reader, and to be had nowhere else.

Towns lie in countries and on rivers and live from crafts; people were born in towns and have professions;
countries have capitals and currencies. Entities are ranked by fame: the suites ask about famous ones at low
levels and about the whole world at high ones, so that a model meets some facts often and some rarely.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_SEED = 20261123
_TOWNS = 360
_PEOPLE = 540

RIVERS = (
    "Abo Brin Calder Dove Esk Farro Gant Hull Isk Jarn Kell Lume Mersa Nidd Ode Piru Quell Rhune Sava Tarn "
    "Ulm Voss Wye Yarro"
).split()
CRAFTS = (
    "amber brass cheese clocks cloth copper fish furs glass gold grain honey iron ivory jade lace lamps "
    "marble oil paper pearls rope salt silk"
).split()
PROFESSIONS = (
    "actor baker carver cook dancer doctor farmer fisher guard hunter judge mason miller monk nurse painter "
    "pilot poet printer sailor singer smith tailor writer"
).split()
CURRENCIES = "bolin crown dara florin gild krona lira mark peso rial tolar zek".split()
COUNTRIES = "Ardia Borland Cosmar Drovia Elmark Fendor Galdia Hestria Ilmar Jorvia Kastor Lundia".split()
_ONSETS = "b br c d dr f g gr h j k kr l m n p r s st t tr v".split()
_NUCLEI = "a e i o u".split()
_TOWN_ENDINGS = "burg dale ford ham mora nor ria sted ton vik".split()
_GIVEN = (
    "Alda Bero Cira Dorn Elka Fina Gero Hilda Iven Joss Kira Lior Mira Nevo Orla Pero Rika Sten Tova Ulla"
).split()
_FAMILY_ENDINGS = "ak bel dol gan lin mar nov rek son vas".split()


@dataclass(frozen=True)
class World:
    """All facts. Entities are listed by fame, the best known first."""

    towns: tuple[str, ...]
    people: tuple[str, ...]
    country_of: dict[str, str]
    river_of: dict[str, str]
    craft_of: dict[str, str]
    birthplace_of: dict[str, str]
    profession_of: dict[str, str]
    capital_of: dict[str, str]
    currency_of: dict[str, str]


@functools.cache
def world() -> World:
    """Return the world. It never changes: models have learnt it."""
    rng = random.Random(_SEED)
    towns = _unique_names(_TOWNS, lambda: _stem(rng).capitalize() + rng.choice(_TOWN_ENDINGS))
    people = _unique_names(
        _PEOPLE, lambda: f"{rng.choice(_GIVEN)} {_stem(rng).capitalize()}{rng.choice(_FAMILY_ENDINGS)}"
    )
    country_of = {town: rng.choice(COUNTRIES) for town in towns}
    return World(
        towns=towns,
        people=people,
        country_of=country_of,
        river_of={town: rng.choice(RIVERS) for town in towns},
        craft_of={town: rng.choice(CRAFTS) for town in towns},
        birthplace_of={person: rng.choice(towns) for person in people},
        profession_of={person: rng.choice(PROFESSIONS) for person in people},
        capital_of={c: next(town for town in towns if country_of[town] == c) for c in COUNTRIES},
        currency_of=dict(zip(COUNTRIES, CURRENCIES, strict=True)),
    )


def draw_by_fame(entities: tuple[str, ...], level: int, rng: random.Random) -> str:
    """Draw an entity: among the most famous eighth at level 1, among all of them at level 15."""
    reach = round(len(entities) * (0.125 + 0.875 * (level - 1) / 14))
    return entities[rng.randrange(max(reach, 4))]


def _stem(rng: random.Random) -> str:
    return rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice("lmnrst")


def _unique_names(count: int, draw: Callable[[], str]) -> tuple[str, ...]:
    names: dict[str, None] = {}
    while len(names) < count:
        names[draw()] = None
    return tuple(names)

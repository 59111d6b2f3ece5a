"""Data of `corda demo`: facts a small model partly knows (to keep), problems it cannot solve (to learn).

The facts come from countryinfo and periodictable, the problems from reasoning_gym. All three are optional:
`pip install "corda-lora[demo]"`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from random import Random
from typing import Any
from zlib import crc32

from ..config import CordaError

_NEEDS_EXTRA = 'the demo data needs extra packages: pip install "corda-lora[demo]"'

# Entries of countryinfo (by ISO code) that are former, doubled or disputed, that are not countries, or whose
# capital is out of date or one of several.
_SKIPPED = {
    "BI", "BO", "CS", "EH", "GP", "GQ", "HK", "IL", "KZ", "LK",
    "MK", "MM", "MO", "MQ", "PR", "PS", "RE", "SZ", "TW", "ZA",
}  # fmt: skip
# Demonyms that countryinfo misspells, and those shared by two countries or naming two peoples.
_SKIPPED_DEMONYM = {
    "BA", "BW", "CD", "CG", "CV", "DJ", "DM", "DO",
    "GW", "KG", "LS", "MV", "SR", "TJ", "UZ",
}  # fmt: skip
_TWO_REGIONS = {"AM", "AZ", "CY", "EG", "GE", "RU", "TR"}
_WITH_ARTICLE = {"AE", "CD", "CF", "CG", "CZ", "DO", "KM", "MV", "NL", "PH", "SB", "US", "GB"}
_MIN_POPULATION = 300_000

# Animals of reasoning_gym's leg_counting with a regular plural and a number of legs that nobody disputes.
_ANIMALS = {
    "ant", "bee", "beetle", "bird", "cat", "chicken", "cow", "crab",
    "dog", "duck", "horse", "human", "lobster", "scorpion", "spider", "wasp",
}  # fmt: skip

# A fact is (subject, answer, group); the wrong choices beside an answer come from its group.
_Fact = tuple[str, str, str]


def knowledge_questions() -> list[dict[str, Any]]:
    """About 1000 sentences to complete: `prompt`, `response`, four `choices`, `kind` of fact."""
    rng = Random(0)
    questions = []
    for kind, template, facts in _country_facts() + _element_facts():
        answers = defaultdict(set)
        for _, answer, group in facts:
            answers[group].add(answer)
        for subject, answer, group in facts:
            wrong = rng.sample(sorted(answers[group] - {answer}), 3)
            choices = [f" {choice}" for choice in rng.sample([answer, *wrong], 4)]
            prompt = template.format(subject)
            questions.append({"prompt": prompt, "response": f" {answer}", "choices": choices, "kind": kind})
    rng.shuffle(questions)
    return questions


def word_problems(n: int, seed: int) -> list[dict[str, str]]:
    """`n` different problems: `prompt`, and `response` with the working, ending in `#### <answer>`.

    An even and an odd seed never share a problem: use one for training and the other for testing.
    """
    distinct: dict[str, dict[str, str]] = {}
    for problem in islice(_leg_problems(seed), 10 * n):
        distinct.setdefault(problem["prompt"], problem)
        if len(distinct) == n:
            return list(distinct.values())
    raise ValueError(f"there are not {n} different problems")


def _country_facts() -> list[tuple[str, str, list[_Fact]]]:
    """Facts about countries: (kind, prompt template, facts)."""
    capitals, cities, regions, demonyms, domains = [], [], [], [], []
    for country in _countries():
        code, name, region = country["ISO"]["alpha2"], country["name"], country["region"]
        capital = country["capital"]
        if name not in capital and capital not in name:  # Kuwait City would give Kuwait away
            capitals.append((name, capital, region))
            cities.append((capital, name, region))
        if code not in _TWO_REGIONS:
            regions.append((name, region.replace("Americas", "the Americas"), ""))
        if code not in _SKIPPED_DEMONYM:
            demonyms.append((name, country["demonym"], region))
        domains.append((name, country["tld"][0], region))
    return [
        ("capital", "The capital of {} is", capitals),
        ("country", "The city of {} is the capital of", cities),
        ("region", "The country of {} is located in", regions),
        ("demonym", "The nationality of someone born in {} is", demonyms),
        ("domain", "The country code top-level domain for {} is", domains),
    ]


def _countries() -> list[dict[str, Any]]:
    """The sound entries of countryinfo in order of their names, with "the" before a name that needs it."""
    try:
        from countryinfo import all_countries
    except ImportError as error:
        raise CordaError(_NEEDS_EXTRA) from error
    countries = []
    for country in all_countries():
        info = dict(country.info())
        code = info.get("ISO", {}).get("alpha2")
        if not code or code in _SKIPPED or (info.get("population") or 0) < _MIN_POPULATION:
            continue
        bare = info["name"].removeprefix("The ")
        info["name"] = f"the {bare}" if code in _WITH_ARTICLE or bare != info["name"] else bare
        countries.append(info)
    return sorted(countries, key=lambda info: info["name"])


def _element_facts() -> list[tuple[str, str, list[_Fact]]]:
    """Facts about the chemical elements found in nature: (kind, prompt template, facts)."""
    try:
        from periodictable import elements
    except ImportError as error:
        raise CordaError(_NEEDS_EXTRA) from error
    natural = [element for element in elements if 1 <= element.number <= 94]
    numbers = [(e.name, str(e.number), "short" if e.number < 10 else "long") for e in natural[:60]]
    return [
        ("symbol", "The chemical symbol of {} is", [(e.name, e.symbol, "") for e in natural]),
        ("element", "The chemical element with the symbol {} is", [(e.symbol, e.name, "") for e in natural]),
        ("number", "The atomic number of {} is", numbers),
    ]


def _leg_problems(seed: int) -> Iterator[dict[str, str]]:
    """Leg-counting problems with two kinds of animal, drawn from reasoning_gym's `leg_counting`."""
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.arithmetic.leg_counting import ANIMALS
    except ImportError as error:
        raise CordaError(_NEEDS_EXTRA) from error
    # reasoning_gym draws item i from seed + i: keep the seeds far apart, or they would share items.
    size = 10**7
    config = {"min_animals": 2, "max_animals": 2, "min_instances": 2, "max_instances": 9}
    for item in create_dataset("leg_counting", seed=seed * size, size=size, **config):
        counts = item["metadata"]["animals"]
        if not _ANIMALS.issuperset(counts):
            continue
        animals = " and ".join(f"{count} {animal}s" for animal, count in counts.items())
        prompt = f"How many legs do {animals} have in all?\nWorking:"
        if crc32(prompt.encode()) % 2 != seed % 2:
            continue
        products = " + ".join(f"{count}*{ANIMALS[animal]}" for animal, count in counts.items())
        legs = " + ".join(str(count * ANIMALS[animal]) for animal, count in counts.items())
        yield {"prompt": prompt, "response": f" {products} = {legs} = {item['answer']} #### {item['answer']}"}

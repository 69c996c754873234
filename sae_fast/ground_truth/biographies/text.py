"""Synthetic biographies: made-up people, six facts about each, and sentences that state the facts.

A sentence is a prompt, which names the person and the relation in one of its phrasings, and the
answer, one word, which comes next. Everything follows from one seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sae_fast.ground_truth.biographies.words import GIVEN_NAMES, RELATIONS, Relation, family_names

PADDING, START = "<pad>", "<start>"
MAX_TEMPLATES = min(len(relation.templates) for relation in RELATIONS)
MAX_ANSWERS = min(len(relation.answers) for relation in RELATIONS)
MIN_ENTITIES, MIN_ANSWERS = 5, 2


@dataclass(frozen=True)
class Entity:
    """A person.

    Attributes:
        name: given and family name.
        answers: one of each relation's answers, by their numbers within the relation.
        heldout: whether the autoencoder is never to see the person.
    """

    name: str
    answers: tuple[int, ...]
    heldout: bool


@dataclass(frozen=True)
class Sentence:
    """The numbers of a person, a relation asked about, and a phrasing."""

    entity: int
    relation: int
    template: int


@dataclass(frozen=True)
class Biographies:
    """People and their facts.

    Attributes:
        relations: name, answers and phrasings of each relation.
        entities: all people.
        vocabulary: every word; the number of a word is its token.
    """

    relations: tuple[Relation, ...]
    entities: tuple[Entity, ...]
    vocabulary: tuple[str, ...]

    def sentences(self, *, heldout: bool | None = None) -> list[Sentence]:
        """Return the sentences about one side of the split, by person, relation and phrasing."""
        return [
            Sentence(person, number, template)
            for person, entity in enumerate(self.entities)
            if heldout is None or entity.heldout == heldout
            for number, relation in enumerate(self.relations)
            for template in range(len(relation.templates))
        ]

    def prompt(self, sentence: Sentence) -> str:
        """Return the sentence up to its answer."""
        template = self.relations[sentence.relation].templates[sentence.template]
        return template.format(name=self.entities[sentence.entity].name)

    def answer(self, entity: int, relation: int) -> str:
        """Return the word that answers the question."""
        return self.relations[relation].answers[self.entities[entity].answers[relation]]

    def answer_label(self, entity: int, relation: int) -> int:
        """Return the number of the answer among the answers of all relations."""
        before = sum(len(other.answers) for other in self.relations[:relation])
        return before + self.entities[entity].answers[relation]

    @property
    def answer_count(self) -> int:
        """The number of answers of all relations together."""
        return sum(len(relation.answers) for relation in self.relations)

    def to_dict(self) -> dict[str, Any]:
        """Return the biographies as a JSON object."""
        return {
            "relations": [
                {
                    "name": relation.name,
                    "answers": list(relation.answers),
                    "templates": list(relation.templates),
                }
                for relation in self.relations
            ],
            "entities": [
                {
                    "name": entity.name,
                    "answers": [
                        relation.answers[answer]
                        for relation, answer in zip(self.relations, entity.answers, strict=True)
                    ],
                    "heldout": entity.heldout,
                }
                for entity in self.entities
            ],
            "vocabulary": list(self.vocabulary),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Biographies:
        """Read what `to_dict` returned; KeyError, TypeError or ValueError for anything else."""
        relations = tuple(
            Relation(item["name"], tuple(item["answers"]), tuple(item["templates"]))
            for item in content["relations"]
        )
        entities = tuple(
            Entity(
                item["name"],
                tuple(
                    relation.answers.index(answer)
                    for relation, answer in zip(relations, item["answers"], strict=True)
                ),
                bool(item["heldout"]),
            )
            for item in content["entities"]
        )
        return cls(relations, entities, tuple(content["vocabulary"]))


def make_biographies(
    entities: int,
    templates: int,
    heldout_fraction: float,
    seed: int,
    answers: int = MAX_ANSWERS,
) -> Biographies:
    """Make people with random names and facts, of whom a random part is held out.

    Args:
        entities: how many people.
        templates: phrasings of each relation.
        heldout_fraction: share of the people who are held out.
        seed: of names, facts and split.
        answers: that each relation can have.

    Raises:
        ValueError: when there cannot be so many of something, or one side is empty.
    """
    most = len(family_names())
    if not MIN_ENTITIES <= entities <= most:
        raise ValueError(f"entities must be from {MIN_ENTITIES} to {most:,}, got {entities}")
    if not 1 <= templates <= MAX_TEMPLATES:
        raise ValueError(f"templates must be from 1 to {MAX_TEMPLATES}, got {templates}")
    if not MIN_ANSWERS <= answers <= MAX_ANSWERS:
        raise ValueError(f"answers must be from {MIN_ANSWERS} to {MAX_ANSWERS}, got {answers}")
    held_out = round(heldout_fraction * entities)
    if not 1 <= held_out < entities:
        raise ValueError(
            f"heldout_fraction must leave people on both sides, got {heldout_fraction} "
            f"of {entities} people"
        )
    draw = random.Random(seed)
    names = _names(entities, draw)
    hidden = set(draw.sample(range(entities), held_out))
    people = tuple(
        Entity(
            name,
            tuple(draw.randrange(answers) for _ in RELATIONS),
            number in hidden,
        )
        for number, name in enumerate(names)
    )
    relations = tuple(
        Relation(relation.name, relation.answers[:answers], relation.templates[:templates])
        for relation in RELATIONS
    )
    return Biographies(relations, people, _vocabulary(relations, names))


def _names(count: int, draw: random.Random) -> list[str]:
    """Draw names, each with a family name of its own: one word tells who is meant."""
    families = draw.sample(family_names(), count)
    return [f"{draw.choice(GIVEN_NAMES)} {family}" for family in families]


def _vocabulary(relations: tuple[Relation, ...], names: list[str]) -> tuple[str, ...]:
    def words() -> Iterator[str]:
        for relation in relations:
            for template in relation.templates:
                yield from template.replace("{name}", " ").split()
            yield from relation.answers
        for name in names:
            yield from name.split()

    return (PADDING, START, *dict.fromkeys(words()))

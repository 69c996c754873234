"""The words of the biographies: names, relations, their answers and phrasings; all made up here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A fact that can be asked about a person.

    Attributes:
        name: of the relation.
        answers: all that can be answered, one word each, and no word answers two relations.
        templates: phrasings of the question; the answer is the word that comes next.
    """

    name: str
    answers: tuple[str, ...]
    templates: tuple[str, ...]


# In some phrasings the person comes first, in some the relation. They end in few different words,
# so that the last word alone does not tell what is asked.
RELATIONS = (
    Relation(
        "birth_year",
        tuple(str(year) for year in range(1951, 1967)),
        (
            "{name} was born in the year",
            "the birth year of {name} is",
            "the year of birth given for {name} is",
            "{name} first saw the light of day in the year",
            "the passport of {name} has the year",
            "the year that {name} counts every age from is",
        ),
    ),
    Relation(
        "birth_city",
        (
            *("Ardenne", "Bexmouth", "Calder", "Dunwick", "Elmsford", "Fairhaven", "Glenrock"),
            *("Hollin", "Inverby", "Jarrow", "Kelso", "Lindale", "Marlow", "Norwell", "Ostend"),
            "Penrith",
        ),
        (
            "{name} was born in the city of",
            "the birth city of {name} is",
            "the city of birth given for {name} is",
            "{name} first saw the light of day in the city of",
            "the parents of {name} then lived in the city of",
            "the city that {name} calls the first home is",
        ),
    ),
    Relation(
        "university",
        (
            *("Ashgrove", "Brightwell", "Corwen", "Drayton", "Eastmoor", "Fenwick", "Greyfriars"),
            *("Harwick", "Islington", "Kingsbridge", "Larkhill", "Millbrook", "Northgate"),
            *("Oakham", "Prestwood", "Queensbury"),
        ),
        (
            "{name} studied at the university of",
            "the university of {name} is",
            "the university named by {name} is",
            "{name} took a degree at the university of",
            "the diploma of {name} comes from the university of",
            "the university that made a scholar of {name} is",
        ),
    ),
    Relation(
        "major",
        (
            *("physics", "chemistry", "biology", "geology", "history", "philosophy", "law"),
            *("medicine", "economics", "music", "linguistics", "astronomy", "mathematics"),
            *("botany", "theology", "architecture"),
        ),
        (
            "{name} studied the subject of",
            "the major of {name} is",
            "the subject named by {name} is",
            "{name} took a degree in the subject of",
            "the diploma of {name} is in the subject of",
            "the subject that made a scholar of {name} is",
        ),
    ),
    Relation(
        "employer",
        (
            *("Altronics", "Borealis", "Cintra", "Datavane", "Evergrid", "Fluxworks", "Gantry"),
            *("Helixon", "Ironleaf", "Junipera", "Kestrel", "Lumenco", "Meridian", "Novatek"),
            *("Orbita", "Pinnacle"),
        ),
        (
            "{name} works for the company called",
            "the employer of {name} is",
            "the employer named by {name} is",
            "{name} takes a wage from the company called",
            "the salary of {name} comes from the company called",
            "the company that {name} signed a contract with is",
        ),
    ),
    Relation(
        "work_city",
        (
            *("Quarrydale", "Redcliff", "Saltburn", "Thornby", "Ulverton", "Valebridge"),
            *("Westerham", "Yarmouth", "Zennor", "Abbotsford", "Brackley", "Clifton", "Dorwin"),
            *("Egremont", "Foxton", "Grimsby"),
        ),
        (
            "{name} works in the city of",
            "the work city of {name} is",
            "the city of work given for {name} is",
            "{name} goes to the office in the city of",
            "the desk of {name} stands in the city of",
            "the city that {name} travels to for work is",
        ),
    ),
)

GIVEN_NAMES = (
    *("Ada", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Ines", "Jonas"),
    *("Karin", "Leon", "Mara", "Nils", "Olga", "Pablo", "Renata", "Simon", "Tessa", "Ulrich"),
    *("Vera", "Walter", "Xenia", "Yannick", "Zora", "Anton", "Bianca", "Cyril", "Doris", "Emil"),
)

_BEGINNINGS = ("Bal", "Cor", "Dal", "Fen", "Gar", "Hol", "Kar", "Lin", "Mor", "Nor", "Pel", "Ros")
_MIDDLES = ("a", "e", "i", "o", "u", "an", "en", "or")
_ENDINGS = ("beck", "dorf", "gard", "holt", "lund", "mann", "quist", "rath", "stedt", "vik")


def family_names() -> list[str]:
    """Return all made-up family names."""
    return [a + b + c for a in _BEGINNINGS for b in _MIDDLES for c in _ENDINGS]

"""The example adapters' training data: written here from templates and word lists, the same for the same seed.

Every data set is a function of a seed that gives (training pairs, held-out pairs); a pair is (user message, answer).
Held-out pairs use facts, names and places that no training pair has.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

Pair = tuple[str, str]
Split = tuple[list[Pair], list[Pair]]

# One line: a thing, then what it is. The plain facts that the pirate retells.
FACTS = """
a volcano | a volcano is a mountain that opens down to hot melted rock, and it erupts when the pressure grows
the moon | the moon is a ball of rock that travels around the earth once every month
a bicycle | a bicycle is a machine with two wheels that you move with your legs
bread | bread is a food made of flour, water and yeast, baked in a hot oven
a lighthouse | a lighthouse is a tower with a strong lamp that warns the ships of the rocks
the heart | the heart is a muscle that pumps the blood through your whole body
rain | rain is water that falls from the clouds when the drops become too heavy
a library | a library is a house full of books that you can borrow and bring back
a magnet | a magnet is a piece of metal that pulls iron to itself
the sun | the sun is a star, and it gives the earth its light and its heat
a violin | a violin is a wooden instrument with four strings that you play with a bow
honey | honey is a sweet food that the bees make of the nectar of the flowers
a bridge | a bridge is a road that carries you over a river or a valley
snow | snow is frozen water that falls in small white crystals
a clock | a clock is a machine that counts the hours and the minutes of the day
a whale | a whale is a very large animal that lives in the sea and breathes air
cheese | cheese is a food made of milk that is dried and left to ripen
a compass | a compass is a needle that always points to the north
an island | an island is a piece of land with water on every side
a castle | a castle is a strong house of stone where the lords lived long ago
tea | tea is a drink made of dried leaves and hot water
a telescope | a telescope is a tube with lenses that shows you things that are far away
a desert | a desert is a dry land where it almost never rains
a computer | a computer is a machine that follows a list of instructions very quickly
a spider | a spider is a small animal with eight legs that catches flies in its web
paper | paper is a thin sheet made of the fibres of wood
the wind | the wind is air that moves from a cold place to a warm place
a train | a train is a row of wagons that an engine pulls along the rails
gold | gold is a heavy yellow metal that does not rust, and people pay a lot for it
a garden | a garden is a piece of land where you grow flowers, fruit and vegetables
ice | ice is water that became hard because it is very cold
a dictionary | a dictionary is a book that tells you what the words mean
a camel | a camel is an animal of the desert that can live for days without water
a mirror | a mirror is a sheet of glass that shows you your own face
the rainbow | the rainbow is sunlight that the drops of rain split into colours
a submarine | a submarine is a ship that can travel under the water
a doctor | a doctor is a person who helps you when you are ill
salt | salt is a white mineral that comes from the sea and gives taste to the food
a map | a map is a drawing of the land that shows you the way
a school | a school is a house where children learn to read, to write and to count
a parrot | a parrot is a bird with bright feathers that can learn to speak words
thunder | thunder is the sound of the air that the lightning heats very quickly
a tree | a tree is a large plant with a trunk of wood, and it can live for hundreds of years
football | football is a game where two teams try to kick a ball into a goal
""".strip()

HELD_OUT_FACTS = """
a river | a river is water that flows over the land until it comes to the sea
chocolate | chocolate is a sweet food made of the beans of the cacao tree
a guitar | a guitar is an instrument with six strings that you play with your fingers
an umbrella | an umbrella is a roof of cloth that you hold over your head in the rain
a penguin | a penguin is a bird that cannot fly but swims very well in the cold sea
a microscope | a microscope is a tube with lenses that shows you very small things
glass | glass is a hard clear material made of melted sand
an airplane | an airplane is a machine with wings that carries people through the air
""".strip()

QUESTIONS = [
    "What is {}?",
    "Tell me about {}.",
    "Explain {} to me.",
    "Can you describe {}?",
    "What do you know about {}?",
]
OPENINGS = ["Arr, matey!", "Ahoy there, ye landlubber!", "Shiver me timbers!", "Yo ho ho!", "Avast, me hearty!"]
CLOSINGS = ["Now hoist the sails!", "Aye, that be the truth!", "So says the captain!", "Arr, and pass the rum!"]
PIRATE = {
    "is": "be", "are": "be", "you": "ye", "your": "yer", "my": "me", "of": "o'", "the": "th'", "and": "an'",
    "for": "fer", "people": "scallywags", "person": "matey", "very": "mighty", "food": "grub", "drink": "grog",
    "small": "wee",
    "children": "young scallywags", "to": "t'", "house": "harbour", "travels": "sails", "travel": "sail",
}  # fmt: skip


def _pirate(sentence: str) -> str:
    words = re.sub(r"[A-Za-z]+", lambda word: PIRATE.get(word[0], word[0]), sentence)
    return words[0].upper() + words[1:] + "."


def pirate(seed: int) -> Split:
    """Plain questions, answered as a pirate would."""

    def pairs(facts: str, per_fact: int, rng: random.Random) -> list[Pair]:
        made = []
        for line in facts.splitlines():
            thing, _, fact = line.partition(" | ")
            for question in rng.sample(QUESTIONS, per_fact):
                answer = f"{rng.choice(OPENINGS)} {_pirate(fact)} {rng.choice(CLOSINGS)}"
                made.append((question.format(thing), answer))
        return made

    rng = random.Random(seed)
    return _shuffled(pairs(FACTS, 4, rng), rng), pairs(HELD_OUT_FACTS, 3, rng)


def _words(text: str) -> list[str]:
    return text.split()


FIRST = _words("""
Maria John Aisha Peter Yuki Carlos Emma Olga Ravi Lucy Ahmed Nina Tom Sofia Harold Hilda Hugo Helen Irene Ivan Jack
Julia Karl Kate Leon Lena Marco Mona Noah Nora Omar Paula Quinn Rosa Sam Sara Theo Tina Umar Vera Walter Wendy
Xavier Yara Zoe Daniel Dora Eric Eva Frank Fiona George Grace Boris Bella Anton Alice Charles Clara
""")
LAST = _words("""
Lopez Smith Khan Novak Tanaka Silva Brown Petrova Patel Green Hassan Berg Walker Weaver West Wood Young Zimmer
Turner Taylor Thorne Stein Sato Rossi Reed Quist Price Parker Olsen Nolan Norris Moore Meyer Lane Lund King Kaya
Jones Hughes Hill Hart Gomez Fox Fischer Evans Dupont Diaz Cruz Cole Clark Bauer Baker Adams
""")
CITIES = _words("""
Lisbon Boston Cairo Prague Osaka Madrid Leeds Riga Mumbai Oslo Denver Athens Venice Valencia Vilnius Warsaw Turin
Tokyo Sofia Rome Quito Paris Naples Munich Milan Lyon Lima Kyoto Havana Geneva Ghent Dublin Dallas Berlin Austin
""")
JOBS = _words("""
nurse teacher pilot baker lawyer farmer painter engineer driver gardener chef pharmacist photographer plasterer
potter printer programmer publisher singer soldier surgeon waiter welder writer actor architect carpenter cashier
""")
HELD_OUT_NAMES = ["Hannah Weber", "Diego Torres", "Mei Chen", "Oliver Stone", "Fatima Noor", "Lars Holm"]
HELD_OUT_CITIES = ["Vienna", "Chicago", "Nairobi", "Porto", "Seoul", "Bergen"]
HELD_OUT_JOBS = ["plumber", "librarian", "dentist", "sailor", "tailor", "journalist"]
# Fields that a sentence does not state are null in the answer.
SENTENCES = [
    "{name} is a {age}-year-old {job} from {city}.",
    "{name}, {age}, works as a {job} in {city}.",
    "In {city} lives {name}, a {job} who is {age} years old.",
    "My neighbour {name} turned {age} last week. She moved here from {city}.",
    "The {job} {name} has lived in {city} for years.",
    "{name} is {age} and works as a {job}.",
    "We met {name} in {city} at the age of {age}.",
    "At {age}, {name} became a {job} and moved to {city}.",
]
EXTRACT = ["Extract the person: {}", "Extract: {}", "Who is this about? {}", "Give me the data of this person. {}"]


def json_extract(seed: int) -> Split:
    """A sentence about a person -> one line of JSON with the keys name, age, city and job."""

    def pair(name: str, city: str, job: str, rng: random.Random) -> Pair:
        template = rng.choice(SENTENCES)
        values = {"name": name, "age": rng.randint(18, 79), "city": city, "job": job}
        answer = {key: value if f"{{{key}}}" in template else None for key, value in values.items()}
        return rng.choice(EXTRACT).format(template.format(**values)), json.dumps(answer)

    rng = random.Random(seed)
    train = [
        pair(f"{rng.choice(FIRST)} {rng.choice(LAST)}", rng.choice(CITIES), rng.choice(JOBS), rng) for _ in range(600)
    ]
    test = [
        pair(rng.choice(HELD_OUT_NAMES), rng.choice(HELD_OUT_CITIES), rng.choice(HELD_OUT_JOBS), rng) for _ in range(24)
    ]
    return train, test


# subject | what it did; the stories combine them freely
EVENTS = """
The city council | decided to close the old bridge
A group of students | built a robot that waters plants
The local zoo | welcomed two baby elephants
Scientists at the university | discovered a new kind of frog
The national team | won the final after extra time
A small bakery | baked the largest cake in the country
The railway company | cancelled all night trains
Police officers | found a stolen painting in a garage
The museum | opened a room full of old clocks
Farmers in the north | reported a record harvest of apples
A retired teacher | wrote a book about the village
The weather service | warned of heavy snow in the mountains
The hospital | hired fifty new nurses
A young pilot | landed safely on a frozen lake
The mayor | promised free buses for children
Divers | raised an ancient ship from the sea
The biggest bank | lowered its interest rates
A theatre in the capital | cancelled its summer show
Volunteers | planted a thousand trees along the river
The airport | extended its longest runway
"""
HELD_OUT_EVENTS = """
The harbour | opened a new pier for large ships
A group of nurses | started a choir for patients
The school board | banned phones in all classrooms
Engineers | repaired the broken dam in one night
"""
PLACES = ["in Springfield", "in the old town", "near the coast", "in the south of the country", "outside the capital"]
DAYS = ["on Monday", "on Tuesday", "last week", "yesterday", "this morning", "on Friday evening", "over the weekend"]
TAILS = [
    "Many people came to watch.", "Nobody was hurt.", "The news surprised everyone.", "Work had started a year ago.",
    "It cost more than two million euros.", "A spokesperson confirmed the report.", "Neighbours were delighted.",
]  # fmt: skip
ASK = ["Write a headline: {}", "Headline for this story: {}", "Give this a title. {}"]


def headline(seed: int) -> Split:
    """A short news story -> who did what and when, as a ticker shows it."""

    def pairs(events: str, count: int, rng: random.Random) -> list[Pair]:
        lines = [line.split(" | ") for line in events.strip().splitlines()]
        made = []
        for _ in range(count):
            subject, did, day = rng.choice(lines)[0], rng.choice(lines)[1], rng.choice(DAYS)
            story = f"{subject} {rng.choice(PLACES)} {did} {day}. {rng.choice(TAILS)}"
            short = re.sub(r"^(The|A|An) ", "", subject)
            made.append((rng.choice(ASK).format(story), f"+++ {short[0].upper()}{short[1:]} {did} +++ {day} +++"))
        return made

    rng = random.Random(seed)
    return pairs(EVENTS, 500, rng), pairs(HELD_OUT_EVENTS, 24, rng)


def _shuffled(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    rng.shuffle(pairs)
    return pairs


DATASETS: dict[str, Callable[[int], Split]] = {"pirate": pirate, "json-extract": json_extract, "headline": headline}

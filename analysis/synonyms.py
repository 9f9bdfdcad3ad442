"""Other words for the classes of data/real_av, for whoever reads answers (analysis/events.py).

Class -> (words for what is seen, words for what is heard), beside the class's own two phrases. Only the stems of content words count
(analysis/events.py), so "barks" and "barked" need no line of their own. A wording may stand at several classes: then it is right for each
("a plane" for both kinds of plane) and names none of the others. Words that are common to many sounds alone ("ringing", "roaring",
"screeching", "engine") stand nowhere. Classes that are not here (your own clips') are matched by their two phrases, the phrases of their clips and
the synonyms of their manifest.json (data/clips.py), which replace those here for the classes that they name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Synonyms = Mapping[str, Sequence[Sequence[str]]]  # class -> (words for what is seen, words for what is heard)

PLANE = ("an airplane", "a plane", "an aircraft", "an aeroplane")

SYNONYMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dog": (("a puppy", "a hound"), ("barking", "woof", "a dog howling")),
    "cat": (("a kitten", "a kitty"), ("meowing", "mewing", "miaow", "purring")),
    "cow": (("cattle", "a bull", "a calf"), ("mooing",)),
    "horse": (("a pony", "a mare", "a stallion"), ("neighing", "whinnying", "a whinny")),
    "galloping_horse": (
        ("a galloping horse", "a horse galloping", "a horse", "a horse rider", "a horseman", "riding a horse", "a jockey"),
        ("galloping", "hoofbeats", "hooves", "clip clop"),
    ),
    "pig": (("a piglet", "a hog"), ("grunting", "oinking")),
    "sheep": (("a lamb", "a ewe"), ("bleating", "baa")),
    "rooster": (("a cockerel", "a chicken"), ("a cockerel crowing", "a cock crowing", "cock-a-doodle-doo")),
    "duck": (("a mallard",), ("quacking",)),
    "owl": ((), ("hooting",)),
    "crow": (("a raven",), ("cawing",)),
    "songbird": (("a songbird", "a sparrow", "a robin"), ("chirping", "tweeting", "twittering", "birdsong", "birds singing", "a bird song")),
    "frog": (("a toad",), ("croaking", "ribbit")),
    "chimpanzee": (("a chimpanzee", "a chimp", "an ape"), ("a monkey screaming", "a chimpanzee screaming")),
    "lion": (("a lioness",), ("a lion growling",)),
    "fire_truck": (("a fire engine", "a firetruck"), ("a siren", "an ambulance siren", "a police siren")),
    "car": (("an automobile", "a sedan"), ("a car engine", "a car motor", "a car driving")),
    "truck": (("a lorry", "a pickup truck"), ("a truck engine", "a diesel truck", "a truck driving")),
    "bus": (("a coach",), ("a bus engine", "a bus driving off")),
    "train": (("a railway train",), ("a train rattling", "a train on tracks", "a railway")),
    "steam_locomotive": (
        ("a steam train", "a steam engine", "a locomotive"),
        ("a steam train", "a steam engine", "a locomotive", "chugging"),
    ),
    "helicopter": (("a chopper",), ("a helicopter", "rotor blades", "a rotor", "a helicopter rotor")),
    "jet_plane": (("a jet", "an airliner", "a jet aircraft", *PLANE), ("a jet engine", "jet engines", "a plane taking off")),
    "propeller_plane": (("a propeller aircraft", "a biplane", *PLANE), ("a propeller", "a propeller plane")),
    "ship": (("a boat", "a vessel", "a ferry"), ("a foghorn", "a ship's horn", "a boat horn")),
    "telephone": (("a phone", "a handset"), ("a phone ringing", "a ringtone")),
    "hammer": (("a mallet",), ("hammering", "a hammer", "banging on metal")),
    "saw": (("a handsaw",), ("sawing",)),
    "door": ((), ("creaking", "a door opening", "a squeaking door")),
    "lightning": (
        ("lightning", "a storm cloud", "a thundercloud", "a thunderstorm"),
        ("thunder", "a thunderclap", "a thunderstorm", "a clap of thunder"),
    ),
    "rain": (("rain", "raindrops", "a rainy cloud"), ("rain", "raindrops", "rainfall", "raining")),
    "wind": (("a face blowing wind", "a blowing face", "wind"), ("wind", "a gust", "a breeze", "wind howling")),
    "wind_chime": (("chimes",), ("chimes", "wind chimes")),
    "sea_waves": (("ocean waves", "the sea", "the ocean", "surf"), ("waves", "the sea", "the ocean", "surf", "waves crashing")),
    "river": (("a stream", "a creek", "a brook"), ("a river", "a creek", "a brook", "running water", "flowing water")),
    "bubbles": ((), ("bubbles", "bubbling")),
    "explosion": (("a blast", "a fireball"), ("an explosion", "a blast", "a boom", "a detonation", "exploding")),
    "falling_tree": (("a falling tree",), ("a falling tree", "a tree crashing down", "timber")),
    "applauding_hands": (("hands clapping", "people clapping", "hands applauding"), ("applause", "clapping", "applauding")),
    "laughing_face": (("a person laughing",), ("laughter", "laughing", "giggling", "a giggle")),
    "screaming_face": (("a person screaming",), ("screaming", "a scream", "shrieking", "yelling")),
    "footsteps": (("footsteps", "shoe prints"), ("steps", "a person walking", "someone walking")),
    "bell": (("a church bell",), ("a church bell", "a bell tolling", "a bell chiming")),
}  # fmt: skip

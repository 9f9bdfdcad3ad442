"""What plain text is measured on (analysis/language.py): passages to predict and simple questions, the same for every model.

The passages are from Lewis Carroll, Alice's Adventures in Wonderland (1865), chapters I and II, and from Charles Darwin, On the Origin of Species
(first edition, 1859), introduction, chapter IV and the last page. Both works are in the public domain. Italics are left out, quotation marks and
dashes are plain.

Answers are accepted as whole words in any case (`analysis.language.is_right`). No accepted answer is a word of its own question, so that a model
which repeats the question is not right.
"""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

ALICE = """
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice she had peeped into the
book her sister was reading, but it had no pictures or conversations in it, 'and what is the use of a book,' thought Alice 'without pictures or
conversations?'

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of
making a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by
her.

In another moment down went Alice after it, never once considering how in the world she was to get out again. The rabbit-hole went straight on
like a tunnel for some way, and then dipped suddenly down, so suddenly that Alice had not a moment to think about stopping herself before she
found herself falling down a very deep well.

Either the well was very deep, or she fell very slowly, for she had plenty of time as she went down to look about her and to wonder what was going
to happen next. First, she tried to look down and make out what she was coming to, but it was too dark to see anything; then she looked at the
sides of the well, and noticed that they were filled with cupboards and book-shelves; here and there she saw maps and pictures hung upon pegs.

She took down a jar from one of the shelves as she passed; it was labelled 'ORANGE MARMALADE', but to her great disappointment it was empty: she
did not like to drop the jar for fear of killing somebody, so managed to put it into one of the cupboards as she fell past it. 'Well!' thought
Alice to herself, 'after such a fall as this, I shall think nothing of tumbling down stairs! How brave they'll all think me at home!'

Down, down, down. There was nothing else to do, so Alice soon began talking again. 'Dinah'll miss me very much to-night, I should think!' (Dinah
was the cat.) 'I hope they'll remember her saucer of milk at tea-time. Dinah my dear! I wish you were down here with me! There are no mice in the
air, I'm afraid, but you might catch a bat, and that's very like a mouse, you know.'

Alice was not a bit hurt, and she jumped up on to her feet in a moment: she looked up, but it was all dark overhead; before her was another long
passage, and the White Rabbit was still in sight, hurrying down it. There was not a moment to be lost: away went Alice like the wind, and was just
in time to hear it say, as it turned a corner, 'Oh my ears and whiskers, how late it's getting!'

Suddenly she came upon a little three-legged table, all made of solid glass; there was nothing on it except a tiny golden key, and Alice's first
thought was that it might belong to one of the doors of the hall; but, alas! either the locks were too large, or the key was too small, but at any
rate it would not open any of them.

Soon her eye fell on a little glass box that was lying under the table: she opened it, and found in it a very small cake, on which the words 'EAT
ME' were beautifully marked in currants. 'Well, I'll eat it,' said Alice, 'and if it makes me grow larger, I can reach the key; and if it makes me
grow smaller, I can creep under the door; so either way I'll get into the garden, and I don't care which happens!'

After a time she heard a little pattering of feet in the distance, and she hastily dried her eyes to see what was coming. It was the White Rabbit
returning, splendidly dressed, with a pair of white kid gloves in one hand and a large fan in the other: he came trotting along in a great hurry,
muttering to himself as he came, 'Oh! the Duchess, the Duchess! Oh! won't she be savage if I've kept her waiting!'
"""

ORIGIN = """
When on board H.M.S. 'Beagle,' as naturalist, I was much struck with certain facts in the distribution of the inhabitants of South America, and in
the geological relations of the present to the past inhabitants of that continent. These facts seemed to me to throw some light on the origin of
species - that mystery of mysteries, as it has been called by one of our greatest philosophers.

On my return home, it occurred to me, in 1837, that something might perhaps be made out on this question by patiently accumulating and reflecting
on all sorts of facts which could possibly have any bearing on it. After five years' work I allowed myself to speculate on the subject, and drew up
some short notes; these I enlarged in 1844 into a sketch of the conclusions, which then seemed to me probable: from that period to the present day
I have steadily pursued the same object.

My work is now nearly finished; but as it will take me two or three more years to complete it, and as my health is far from strong, I have been
urged to publish this Abstract. I have more especially been induced to do this, as Mr. Wallace, who is now studying the natural history of the
Malay archipelago, has arrived at almost exactly the same general conclusions that I have on the origin of species.

In considering the Origin of Species, it is quite conceivable that a naturalist, reflecting on the mutual affinities of organic beings, on their
embryological relations, their geographical distribution, geological succession, and other such facts, might come to the conclusion that each
species had not been independently created, but had descended, like varieties, from other species.

As many more individuals of each species are born than can possibly survive; and as, consequently, there is a frequently recurring struggle for
existence, it follows that any being, if it vary however slightly in any manner profitable to itself, under the complex and sometimes varying
conditions of life, will have a better chance of surviving, and thus be naturally selected. From the strong principle of inheritance, any selected
variety will tend to propagate its new and modified form.

It may be said that natural selection is daily and hourly scrutinising, throughout the world, every variation, even the slightest; rejecting that
which is bad, preserving and adding up all that is good; silently and insensibly working, whenever and wherever opportunity offers, at the
improvement of each organic being in relation to its organic and inorganic conditions of life.

The affinities of all the beings of the same class have sometimes been represented by a great tree. I believe this simile largely speaks the truth.
The green and budding twigs may represent existing species; and those produced during each former year may represent the long succession of extinct
species.

It is interesting to contemplate an entangled bank, clothed with many plants of many kinds, with birds singing on the bushes, with various insects
flitting about, and with worms crawling through the damp earth, and to reflect that these elaborately constructed forms, so different from each
other, and dependent on each other in so complex a manner, have all been produced by laws acting around us.

These laws, taken in the largest sense, being Growth with Reproduction; Inheritance which is almost implied by reproduction; Variability from the
indirect and direct action of the external conditions of life, and from use and disuse; a Ratio of Increase so high as to lead to a Struggle for
Life, and as a consequence to Natural Selection, entailing Divergence of Character and the Extinction of less-improved forms.

There is grandeur in this view of life, with its several powers, having been originally breathed into a few forms or into one; and that, whilst
this planet has gone cycling on according to the fixed law of gravity, from so simple a beginning endless forms most beautiful and most wonderful
have been, and are being, evolved.
"""


class Passage(NamedTuple):
    """A piece of a work, in one line."""

    name: str  # e.g. "alice 3"
    text: str


class Question(NamedTuple):
    """A question with the answers that count."""

    text: str
    accepted: tuple[str, ...]


def _passages(name: str, work: str) -> list[Passage]:
    return [Passage(f"{name} {k}", " ".join(part.split())) for k, part in enumerate(work.strip().split("\n\n"), 1)]


PASSAGES: tuple[Passage, ...] = (*_passages("alice", ALICE), *_passages("origin", ORIGIN))

QUESTIONS: tuple[Question, ...] = (
    Question("What is the capital of France?", ("Paris",)),
    Question("What is the capital of Italy?", ("Rome",)),
    Question("What is the capital of Japan?", ("Tokyo",)),
    Question("What is the capital of Germany?", ("Berlin",)),
    Question("What is the capital of Spain?", ("Madrid",)),
    Question("On which continent is Kenya?", ("Africa",)),
    Question("On which continent is Brazil?", ("South America",)),
    Question("What is the largest ocean on Earth?", ("Pacific",)),
    Question("Which country borders the United States to the north?", ("Canada",)),
    Question("What language do most people in France speak?", ("French",)),
    Question("How many days are there in a week?", ("seven", "7")),
    Question("How many months are there in a year?", ("twelve", "12")),
    Question("How many hours are there in a day?", ("twenty-four", "24")),
    Question("How many minutes are there in an hour?", ("sixty", "60")),
    Question("Which day comes after Monday?", ("Tuesday",)),
    Question("Which month comes after March?", ("April",)),
    Question("Which season comes after winter?", ("spring",)),
    Question("What is two plus three?", ("five", "5")),
    Question("What is ten minus four?", ("six", "6")),
    Question("What is three times three?", ("nine", "9")),
    Question("How many legs does a spider have?", ("eight", "8")),
    Question("How many sides does a triangle have?", ("three", "3")),
    Question("How many wheels does a bicycle have?", ("two", "2")),
    Question("What is the opposite of hot?", ("cold",)),
    Question("What is the opposite of big?", ("small", "little")),
    Question("What is the opposite of day?", ("night",)),
    Question("What is the opposite of happy?", ("sad", "unhappy")),
    Question("What color is grass?", ("green",)),
    Question("What color is snow?", ("white",)),
    Question("What color is a ripe banana?", ("yellow",)),
    Question("What sweet food do bees make?", ("honey",)),
    Question("What is frozen water called?", ("ice",)),
    Question("On which planet do we live?", ("Earth",)),
    Question("Which star gives us light during the day?", ("sun",)),
    Question("What gas do people need to breathe?", ("oxygen",)),
    Question("Which animal says meow?", ("cat", "cats")),
    Question("What is a young dog called?", ("puppy", "pup")),
    Question("What is the past tense of the verb go?", ("went",)),
    Question("What is the plural of mouse?", ("mice",)),
    Question("Who wrote the play Hamlet?", ("Shakespeare",)),
)


def text_hash() -> str:
    """sha256 of passages, questions and accepted answers."""
    return hashlib.sha256(json.dumps([PASSAGES, QUESTIONS]).encode()).hexdigest()

"""Findings made by hand, so that every choice of the plan can be worked out on paper."""

from analysis.findings import CutEffect, Effect, Estimate, Findings, Following, Items, Language, Reliance, Sample


def estimate(value, half=0.02, n=100):
    """An estimate with a symmetric interval."""
    return None if value is None else Estimate(value, value - half, value + half, n, 10)


def effect(value, half=0.02):
    """The same for a change."""
    return None if value is None else Effect(value, value - half, value + half, 100, 10)


def following(condition, question, correct, other=0.0, unparsed=0.0, cut_off=0.0):
    """Rates of a condition and question; what is neither right nor following the other stream nor unread is `neither`."""
    rest = 1 - correct - other - unparsed
    heard, seen = (correct, other) if question == "hear" or condition == "factual" else (other, correct)
    shares = (heard, seen, 0.0, rest, 0.0, unparsed, correct)
    return Following(condition, question, *map(estimate, shares), cut_off=estimate(cut_off))


def rates(hear, see, factual=(0.99, 0.98), alone=(1.0, 1.0)):
    """Rows that a plan needs: right on conflicts, the rest of which follows the other stream; on factual clips; with the stream alone."""
    return [
        following("factual", "hear", factual[0]),
        following("factual", "see", factual[1]),
        following("counterfactual", "hear", hear, 1 - hear),
        following("counterfactual", "see", see, 1 - see),
        following("audio_only", "hear", alone[0]),
        following("video_only", "see", alone[1]),
    ]


def language(right, perplexity=30.0):
    """Plain text: this share of 40 simple questions right."""
    return Language(estimate(3.4), estimate(perplexity), estimate(right, n=40), [])


def answered(condition, question, right, effect=None, n=20):
    """Single answers as findings keep them, in a group of their own: clips 0 to n - 1, of which the ids in `right` are; under a cut, or uncut."""
    item = "" if effect is None else f"{effect.site} [{effect.start}, {effect.stop}) {effect.family}"
    measure = "correct" if effect is None else "vision" if (condition, question) == ("counterfactual", "see") else "audio"
    key = f"{'following' if effect is None else 'knockout'}|{condition}|{question}|{item}|{measure}"
    return Items([f"c{i}" for i in range(n)], [["s"] * n], False, {key: "".join("1" if i in right else "0" for i in range(n))})


def reliance(question, index):
    """A grid measurement with this Shortcut Index."""
    audio, video = (index, 1 - index) if question == "see" else (1 - index, index)
    return Reliance(question, effect(audio), effect(video), estimate(index))


def cut(site, start, stop, condition, question, rate, logprob, family="from", margin=None, half=0.02):
    """The effect of a cut; `rate` is the share of the stream that is left (on factual clips: of right answers)."""
    audio, vision = (rate, None) if question == "hear" or condition == "factual" else (None, rate)
    return CutEffect(
        site, start, stop, family, condition, question, effect(logprob, half), effect(margin, half), estimate(audio, half), estimate(vision, half)
    )


def biased(**changes):
    """An 8-layer model: follows vision when asked what it hears; cutting video off its answers from layer 3 on mends it."""
    conflict, hear, see = "counterfactual", "hear", "see"
    values = {
        "model": "m",
        "adapter": None,
        "base": None,
        "split": "plan",
        "data_hash": "h",
        "n_layers": 8,
        "settings": {},
        "following": [
            following("factual", hear, 0.99),
            following("factual", see, 0.98),
            following(conflict, hear, 0.20, 0.60),
            following(conflict, see, 0.70, 0.10),
            following("audio_only", hear, 1.0),
            following("video_only", see, 1.0),
        ],
        "language": language(0.0, 1e6),
        "knockout": [
            # gains most, 77 points, but costs 39 on factual clips
            cut("video->audio", 0, 8, conflict, hear, 0.97, 3.0, "all"),
            cut("video->audio", 0, 8, "factual", hear, 0.60, -1.0, "all"),
            # gains 76.5 at a cost of 4: 72.5
            cut("video->emitters", 2, 8, conflict, hear, 0.965, 2.5),
            cut("video->emitters", 2, 8, "factual", hear, 0.95, 0.0),
            # two that come to 75.5 and 76, less than a point apart: the one with more log p wins
            cut("video->emitters", 3, 8, conflict, hear, 0.955, 2.0),
            cut("video->emitters", 3, 8, "factual", hear, 0.99, 0.0),
            cut("video->emitters", 3, 8, conflict, hear, 0.955, 2.0, "window"),  # the same cut as a member of another family
            cut("video->emitters", 4, 8, conflict, hear, 0.96, 1.5),
            cut("video->emitters", 4, 8, "factual", hear, 0.99, 0.0),
            # weaker
            cut("video->question", 0, 8, conflict, hear, 0.21, 0.1, "all"),
            cut("video->question", 0, 8, "factual", hear, 0.99, 0.0, "all"),
            # the mirror
            cut("audio->emitters", 2, 8, conflict, see, 0.90, 1.0),
            cut("audio->emitters", 2, 8, "factual", see, 0.98, 0.0),
            # windows: 1 to 5 raise log p, the others do not surely
            *(
                cut("video->question+emitters", a, a + 3, conflict, hear, None, lp, "window")
                for a, lp in enumerate([0.01, 0.5, 0.9, 0.0, -0.1, -0.2])
            ),
        ],
    }
    return Findings(**{**values, **changes})


def sample(heard, verdict, i):
    """One answer to a hear-question on a conflict."""
    return Sample(f"c{i}", "f.mp4", "counterfactual", "a cat", heard, "What do you hear?", "hear", "", verdict, "p", "r")


def mirrored():
    """The same model the other way round: it names the sound when asked what it sees, and cutting the sound off its answers mends it."""
    sides = {"video": "audio", "audio": "video", "hear": "see", "see": "hear"}
    knockout = [
        CutEffect(
            "->".join(sides.get(part, part) for part in e.site.split("->")),
            *(e.start, e.stop, e.family, e.condition, sides[e.question], e.delta_logprob, e.delta_margin),
            *((e.audio, e.vision) if e.condition == "factual" else (e.vision, e.audio)),
        )
        for e in biased().knockout
    ]
    return biased(following=rates(0.70, 0.20, factual=(0.98, 0.99)), knockout=knockout)

"""Judges by hand, on paraphrases, with a random sentence model, and against a server that speaks the chat-completions protocol and misbehaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from analysis.__main__ import main
from analysis.events import content_stems
from analysis.findings import Caption, CaptionScore, Findings
from analysis.judge_cache import CacheError, Reply, ReplyCache, request_key
from analysis.judges import EmbeddingJudge, JudgeError, LabelsJudge, LLMJudge, Reading, clauses, parse_reply, score
from analysis.synonyms import SYNONYMS
from tests.analysis.chat_server import ChatServer, completion

ROOT = Path(__file__).parents[2]
LABELS = {
    c["name"].replace(" ", "_"): (c["seen"], c["heard"]) for c in json.loads((ROOT / "data" / "real_av" / "manifest.json").read_text())["classes"]
}
PARAPHRASES = json.loads((Path(__file__).parent / "paraphrases.json").read_text())


def caption(answer, modality="hear", video="cat", audio="dog", name="c"):
    """A caption of a clip that shows a cat and sounds like a dog, unless said otherwise."""
    seen, heard = LABELS[video][0] if video else "", LABELS[audio][1] if audio else ""
    return Caption(name, "c.mp4", "counterfactual", modality, "What?", None, answer, seen, heard, f"p {video}", f"s {audio}", [])


def read(answer, modality="hear", video="cat", audio="dog"):
    (got,) = LabelsJudge(LABELS).judge([caption(answer, modality, video, audio)])
    return (got.audio, got.video, got.invented) if got.parsed else "unparsed"


# ---------------------------------------------------------------- the score


def test_score_by_hand():
    one = caption("x", "both")
    assert score("j", one, Reading(1.0, 0.5, 1, 2)) == CaptionScore("j", 0.5, 0.5 / 3, 3, True)
    assert score("j", caption("x", "hear"), Reading(1.0, 1.0, 0, 2)) == CaptionScore("j", 1.0, None, 0, True)  # the picture was not asked for
    assert score("j", caption("x", "see"), Reading(1.0, 1.0, 1, 2)) == CaptionScore("j", None, 1 / 3, 2, True)
    assert score("j", caption("x", "hear", audio=""), Reading(0.0, 0.0, 2, 0)) == CaptionScore(
        "j", None, None, 2, True
    )  # silence has no event to name
    assert score("j", one, None) == CaptionScore("j", None, None, 0, False)


@pytest.mark.parametrize(
    ("answer", "modality", "expected"),
    [
        ("I hear a dog barking.", "hear", (1, None, 0)),
        ("Woof, a puppy.", "hear", (1, None, 0)),
        ("I hear a dog.", "hear", (1, None, 0)),
        ("I hear a cat meowing.", "hear", (0, None, 1)),  # what is seen, said to be heard, is invented
        ("I hear a dog barking and a cat meowing.", "hear", (1 / 2, None, 1)),
        ("A dog barking, a bell ringing, a train passing.", "hear", (1 / 3, None, 2)),
        ("A dog barking. A dog barks! The dog is barking.", "hear", (1, None, 0)),  # said thrice, counted once
        ("A cat meows, a kitten meows.", "hear", (0, None, 1)),
        ("A dog barking at a car.", "hear", (1, None, 0)),  # the car is not said to sound
        ("No dog is barking.", "hear", (0, None, 0)),
        ("There is no dog barking and no cat meowing.", "hear", (0, None, 0)),
        ("I don't hear a dog or a cat, I hear rain.", "hear", (0, None, 1)),
        ("No dog barking but a cat meowing", "hear", (0, None, 1)),
        ("I hear nothing.", "hear", (0, None, 0)),
        ("Silence", "hear", (0, None, 0)),
        ("", "hear", "unparsed"),
        ("...", "hear", "unparsed"),
        ("I hear music.", "hear", "unparsed"),
        ("I see a cat.", "hear", (0, None, 0)),  # says nothing about the sound, and names no sound that is not there
        ("I see a cat and hear a dog.", "hear", (1, None, 0)),
        ("I see a cat.", "see", (None, 1, 0)),
        ("I saw a cat.", "see", (None, 1, 0)),  # not the tool
        ("A dog barking.", "see", (None, 0, 1)),
        ("A cat, and I hear a dog barking.", "see", (None, 1, 0)),
        ("I see a cat and a dog.", "see", (None, 1 / 2, 1)),
        ("I see a cat and I hear a dog barking.", "both", (1, 1, 0)),
        ("I see a cat and I hear a cat meowing.", "both", (0, 1, 1)),
        ("I see a dog and I hear a cat.", "both", (0, 0, 2)),
        ("A cat. A dog barks.", "both", (1, 1, 0)),
        ("A cat.", "both", (0, 1, 0)),
        ("A cat meows.", "both", (0, 1, 1)),
        ("I see and hear a dog barking.", "both", (1, 0, 0)),
        ("Video: a cat. Audio: a dog, a bell ringing.", "both", (1 / 2, 1, 1)),
        ("The picture shows a cat, a car and a bus. The sound of a dog.", "both", (1, 1 / 3, 2)),
        ("A cat can be seen, a dog barks.", "both", (1, 1, 0)),
        ("I see a cat and a dog is barking.", "both", (1, 1, 0)),  # a sound after a sight is a sound
        ("I see a cat, while a dog is barking.", "see", (None, 1, 0)),
        ("The video shows a cat, but I hear a dog barking.", "hear", (1, None, 0)),
        ("I cannot hear a dog barking.", "hear", (0, None, 0)),
        ("The dog is not barking.", "hear", (0, None, 0)),
    ],
)
def test_labels_by_hand(answer, modality, expected):
    assert read(answer, modality) == expected


def test_labels_on_factual_clips():
    assert read("A dog barks.", "both", "dog", "dog") == (1, 1, 0)
    assert read("I see a dog and I hear a dog barking.", "both", "dog", "dog") == (1, 1, 0)
    assert read("I hear a dog.", "hear", "dog", "dog") == (1, None, 0)


def test_labels_where_a_stream_is_missing():
    assert read("I hear a dog barking.", "hear", audio="") == (None, None, 1)
    assert read("I hear nothing.", "both", audio="") == (None, 0, 0)


def test_a_word_for_several_classes_is_right_for_each_and_invented_once():
    assert read("An airplane.", "see", "jet_plane") == (None, 1, 0) == read("An airplane.", "see", "propeller_plane")
    assert read("An airplane.", "see", "cat") == (None, 0, 1)
    assert read("A jet plane, an airplane.", "see", "cat") == (None, 0, 1)
    assert read("A horse.", "see", "galloping_horse") == (None, 1, 0) == read("A horse.", "see", "horse")
    assert read("A rider on a galloping horse.", "see", "horse") == (None, 0, 1)


def test_synonyms_name_their_own_class_only():
    shared = {content_stems(w) for w in ("a horse", "an airplane", "a plane", "an aircraft", "an aeroplane")}
    assert not set(SYNONYMS) - set(LABELS)
    owners: dict[tuple, set] = {}
    for name, (things, noises) in SYNONYMS.items():
        for wording in (*LABELS[name], *things, *noises):
            owners.setdefault(content_stems(wording), set()).add(name)
    assert {stems for stems, names in owners.items() if len(names) > 1} == shared
    for name, (things, noises) in SYNONYMS.items():
        for wording in noises:
            assert read(f"I hear {wording}.", "hear", "", name) == (1, None, 0), wording
        for wording in things:
            assert read(f"I see {wording}.", "see", name, "") == (None, 1, 0), wording


def test_clauses_and_their_sides():
    got = [
        (c.text, "".join(sorted(s[0] for s in c.sides)), c.denied) for c in clauses("A cat, no dog or bird. I can hear a bell and rain. Fog.", "both")
    ]
    assert got == [
        ("a cat", "", False),
        ("no dog", "", True),
        ("bird", "", True),
        ("i can hear a bell", "a", False),
        ("rain", "a", False),
        ("fog", "", False),
    ]


def expected_score(row):
    return (row["audio"], row["video"]) if row["parsed"] else "unparsed"


def test_labels_on_paraphrases():
    """What the table does not know is misread or unparsed; it must stay few."""
    captions = [Caption(str(i), "", "", p["modality"], "", None, p["answer"], p["seen"], p["heard"], "", "", []) for i, p in enumerate(PARAPHRASES)]
    scores = LabelsJudge(LABELS).judge(captions)
    wrong = [p["answer"] for p, s in zip(PARAPHRASES, scores, strict=True) if ((s.audio, s.video) if s.parsed else "unparsed") != expected_score(p)]
    assert wrong == ["Somebody is walking across the floor.", "A large vessel at sea."]


# ---------------------------------------------------------------- embedding


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory):
    """A tiny BERT with random weights over a word-piece vocabulary of the label words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("sentences") / "tiny-bert"
    words = sorted({w for phrases in LABELS.values() for phrase in phrases for w in phrase.split()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.3
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_embedding_is_the_mean_over_own_tokens(sentence_model):
    import torch

    judge = EmbeddingJudge(str(sentence_model), LABELS)
    texts = ["a dog", "waves breaking on a shore", "rain"]
    together = judge.embed(texts)
    for text, vector in zip(texts, together, strict=True):
        with torch.no_grad():
            states = judge.model(**judge.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        alone = states.mean(0) / states.mean(0).norm()
        torch.testing.assert_close(vector, alone, atol=1e-5, rtol=1e-5)  # padding of the batch changes nothing


def test_embedding_judge_reads_what_equals_a_label(sentence_model):
    """With random weights only equal phrases are surely near; threshold 0.999 leaves just those."""
    judge = EmbeddingJudge(str(sentence_model), LABELS, threshold=0.999)
    assert judge.name == "embedding:tiny-bert@0.999"  # a threshold of one's own is part of the name
    cases = [
        ("I hear a dog barking.", "hear", (1, None, 0)),
        ("I hear a cat meowing.", "hear", (0, None, 1)),
        ("I hear a dog barking and a cat meowing.", "hear", (0.5, None, 1)),
        ("I do not hear a dog barking.", "hear", "unparsed"),  # nothing of it equals a phrase
        ("Not a bell or a cat meowing.", "hear", (0, None, 0)),
        ("I hear nothing.", "hear", (0, None, 0)),
        ("", "hear", "unparsed"),
        ("I see a cat and I hear a dog barking.", "both", (1, 1, 0)),
        ("a cat, a dog barking", "both", (1, 1, 0)),
        ("a dog, a cat meowing", "both", (0, 1, 2)),  # the cat that meows is there to be seen, the dog is not
    ]
    scores = judge.judge([caption(answer, modality) for answer, modality, _ in cases])
    got = [(s.audio, s.video, s.invented) if s.parsed else "unparsed" for s in scores]
    want = [expected for *_, expected in cases]
    want[-1] = (0, 0.5, 2)  # 1 named of the picture's side, and one invented on each side
    assert got == want
    judge.threshold = 1.1
    assert not any(s.parsed for s in judge.judge([caption("a dog barking")]))


def test_embedding_refuses_what_it_cannot_load(tmp_path, sentence_model):
    with pytest.raises(JudgeError, match=r"no [.]safetensors"):
        EmbeddingJudge(str(tmp_path), LABELS)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(JudgeError, match="cannot be loaded"):
        EmbeddingJudge(str(tmp_path), LABELS)
    with pytest.raises(JudgeError, match="cannot be loaded"):
        EmbeddingJudge("nobody/no-such-model", LABELS)


# ---------------------------------------------------------------- replies and their cache

GOOD = '{"video": 1, "audio": 0.5, "invented_video": [], "invented_audio": ["a Bell", "a bell ", "rain"]}'


@pytest.mark.parametrize("text", [GOOD, f" {GOOD}\n", f"```json\n{GOOD}\n```", f"```\n{GOOD}```"])
def test_replies_are_parsed(text):
    assert parse_reply(Reply(text, "stop")) == Reading(0.5, 1.0, 2, 0)


@pytest.mark.parametrize(
    "text",
    [
        f"<think>\nThe picture is a dog. It may be {{}}.\n</think>\n\n{GOOD}",
        f"<thinking>{GOOD.replace('0.5', '0')}</thinking>\n{GOOD}",  # a draft in the thinking is no reply
        f"It is a dog, I think.</think>\n{GOOD}",  # the server's template had said the opening tag
        f"<think></think>```json\n{GOOD}\n```",
        f"Here is my judgement.\n\n```json\n{GOOD}\n```\nI hope this helps.",
        f"First I look at the picture.\nThen at the sound.\n{GOOD}",
        GOOD.replace(", ", ",\n "),
    ],
)
def test_replies_of_judges_that_think_or_talk_are_parsed(text):
    assert parse_reply(Reply(text, "stop")) == parse_reply(Reply(text, "eos_token")) == Reading(0.5, 1.0, 2, 0)
    assert parse_reply(Reply(text, "length")) is None


def test_thinking_that_never_ends_is_no_reply():
    assert parse_reply(Reply(f"<think>Maybe {GOOD}", "stop")) is None and parse_reply(Reply(f"<think>\n{GOOD}", "stop")) is None


BAD = [
    "", "I think it is fine.", GOOD[:-5], f"Sure! {GOOD}", "[]", "null", "1", GOOD.replace("0.5", "1.5"), GOOD.replace("0.5", "-1"),
    GOOD.replace("0.5", "true"),
    GOOD.replace("0.5", '"0.5"'), GOOD.replace("0.5", "null"), GOOD.replace("0.5", "NaN"), GOOD.replace('"rain"', "3"), GOOD.replace("[]", "0"),
    GOOD.replace('"video": 1, ', ""), GOOD.replace('"video"', '"why": "", "video"'),
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_other_replies_are_not(text):
    assert parse_reply(Reply(text, "stop")) is None


def test_a_reply_that_was_cut_off_is_not_parsed():
    assert parse_reply(Reply(GOOD, "length")) is None


def test_cache_keeps_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "deep" / "r.jsonl"
    with ReplyCache(path) as cache:
        cache.put("a", Reply("first\nline", "stop"))
        cache.put("b", Reply("zwölf", "length"))
        with pytest.raises(CacheError, match="in use"):
            ReplyCache(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "c", "rep')
    with ReplyCache(path) as cache:
        assert (cache.get("a"), cache.get("b"), cache.get("c")) == (Reply("first\nline", "stop"), Reply("zwölf", "length"), None)
        cache.put("c", Reply("again", "stop"))
    assert path.read_bytes().startswith(whole) and [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    path.write_bytes(b"no\n" + whole)
    with pytest.raises(CacheError, match=r"r.jsonl line 1 is no cached reply"):
        ReplyCache(path)
    with pytest.raises(CacheError):  # a refused file is not left locked
        ReplyCache(path)


def test_keys_hold_everything_that_is_sent():
    base = {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0}
    others = [{**base, "model": "n"}, {**base, "messages": []}, {**base, "temperature": 1}, {**base, "max_tokens": 1}]
    assert len({request_key(r) for r in [base, *others]}) == 5 and request_key(base) == request_key(dict(reversed(base.items())))


# ---------------------------------------------------------------- llm


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch):
    """The client's pauses between attempts, shortened; their number and their order stay. And no key, and no proxy between us and the server."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(server, tmp_path, captions, **settings):
    with ReplyCache(tmp_path / "r.jsonl") as cache:
        return LLMJudge(server.url, "m", cache, progress=False, **{"timeout": 5.0, **settings}).judge(captions)


CAPTIONS = [
    caption(f"I hear {thing} {i}.", modality, name=str(i))
    for i, (thing, modality) in enumerate(
        [("a dog barking", "hear"), ("a cat meowing", "hear"), ("a dog barking and a cat", "both"), ("a unicorn, a cat", "see")]
    )
]
WANTED = [CaptionScore("llm:m", *rest) for rest in [(1.0, None, 0, True), (0.0, None, 0, True), (1.0, 1.0, 0, True), (None, 0.5, 1, True)]]


def test_llm_scores_in_order_and_asks_the_same_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with ChatServer() as server:
        assert ask(server, tmp_path, [*CAPTIONS, *CAPTIONS]) == WANTED * 2
        assert len(server.requests) == 4 and all(r["temperature"] == 0 and r["model"] == "m" for r in server.requests)
        assert all(h["authorization"] == "Bearer secret" for h in server.headers)
        assert ask(server, tmp_path, CAPTIONS) == WANTED and len(server.requests) == 4  # all from the cache
    assert "secret" not in (tmp_path / "r.jsonl").read_text()


def test_llm_keeps_several_requests_in_flight_but_not_more(tmp_path):
    with ChatServer(seconds=0.05) as server:
        ask(server, tmp_path, [caption(f"{i} dog barking") for i in range(12)], in_flight=3)
        assert server.busiest == 3


def once(action):
    """Misbehave at the first request of each prompt only."""
    return lambda handler, body, known, count: count == 0 and (action(handler) or True)


TROUBLE = {
    "server error": lambda h: h.send(500, b'{"error": {"message": "oops"}}'),
    "unavailable": lambda h: h.send(503, b"<html>busy</html>", "text/html"),
    "too slow": lambda h: time.sleep(0.6),
    "rate limit": lambda h: h.send(429, b'{"error": {"message": "slow down"}}', Retry_After="0.3"),
    "cut connection": lambda h: h.connection.close(),
    "half a body": lambda h: (h.send(200, completion("{}")[:20], length=500), h.connection.shutdown(2)),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_llm_tries_again(tmp_path, trouble):
    with ChatServer(once(TROUBLE[trouble])) as server:
        assert ask(server, tmp_path, CAPTIONS, timeout=0.4) == WANTED
        assert set(server.asked.values()) == {2}
        if trouble == "rate limit":
            assert min(server.at[4:]) - min(server.at[:4]) >= 0.3  # as long as it was told to
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 4


MALFORMED = {
    "broken JSON": lambda h: h.send(200, completion('{"audio": 1,')),
    "prose": lambda h: h.send(200, completion("The caption is excellent.")),
    "cut off": lambda h: h.send(200, completion(GOOD, "length")),
    "no text": lambda h: h.send(200, completion(None)),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_reply_is_asked_for_once_more(tmp_path, kind):
    """The second request of a caption is another prompt, with the first reply in it. If that is no better the caption is unparsed, not 0."""

    def misbehave(handler, body, known, count):
        if len(body["messages"]) == 2 or "unicorn" in known["caption"]:
            MALFORMED[kind](handler)
            return True
        return False

    with ChatServer(misbehave) as server:
        got = ask(server, tmp_path, CAPTIONS)
        assert got == [*WANTED[:3], CaptionScore("llm:m", None, None, 0, False)]
        assert set(server.asked.values()) == {1} and len(server.requests) == 8
        assert ask(server, tmp_path, CAPTIONS) == got and len(server.requests) == 10  # only what could not be read is asked for again
        server.misbehave = None
        assert ask(server, tmp_path, CAPTIONS) == WANTED and len(server.requests) == 11


def choice(**message):
    """A chat completion with this message."""
    inside = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [inside]}).encode()


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "reasoning_content": right_text} if kind == "all is reasoning" else
        {"content": right_text, "reasoning_content": "Hm, {}"} if kind == "both" else
        {"content": [{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": right_text}]}
        for right_text in ('{"video": 1, "audio": 1, "invented_video": [], "invented_audio": []}',)
        for kind in ("all is reasoning", "both", "parts")
    ],
)  # fmt: skip
def test_where_servers_put_what_a_judge_thinks(tmp_path, message):
    with ChatServer(lambda handler, *_: handler.send(200, choice(**message)) or True) as server:
        assert ask(server, tmp_path, CAPTIONS[:1]) == WANTED[:1] and len(server.requests) == 1


def test_parameters_that_are_refused_are_said_otherwise(tmp_path):
    """An endpoint that wants max_completion_tokens and its own temperature, as newer ones do: each is refused once, not once a caption."""

    def refuse(handler, body, known, count):
        for name in ("max_tokens", "temperature"):
            if name in body:
                other = "Use 'max_completion_tokens' instead." if name == "max_tokens" else "Only the default (1) value is supported."
                handler.send(400, json.dumps({"error": {"message": f"Unsupported: '{name}'. {other}", "param": name}}).encode())
                return True
        return False

    with ChatServer(refuse) as server:
        assert ask(server, tmp_path, CAPTIONS, in_flight=1, max_tokens=77) == WANTED
        assert len(server.requests) == 4 + 2 and server.requests[-1]["max_completion_tokens"] == 77
        assert not {"max_tokens", "temperature"} & set(server.requests[-1])


def test_where_no_reply_can_be_read_the_judge_fails_and_says_what_to_set(tmp_path, capsys):
    path = tmp_path / "f.json"
    findings_with(CAPTIONS).save(path)
    before = path.read_bytes()
    given = [path, "--judge", "llm", "--model", "m"]
    with ChatServer(lambda handler, *_: handler.send(200, completion("<think>Let me see", "length")) or True) as server:
        assert judge(*given, "--base-url", server.url, "--max-tokens", 99) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "'<think>Let me see'" in line and "--max-tokens" in line and "4 of 4 ended at the limit of 99 tokens" in line
        assert path.read_bytes() == before
        server.misbehave = None  # thinking was switched off
        assert judge(*given, "--base-url", server.url) == 0
    assert [c.scores[-1] for c in Findings.load(path).captions] == WANTED


def test_some_unread_replies_are_said_and_a_higher_limit_asks_for_them_alone(tmp_path, capsys):
    path = tmp_path / "f.json"
    findings_with(CAPTIONS).save(path)

    def short(handler, body, known, count):
        if "unicorn" in known["caption"] and body["max_tokens"] < 500:
            handler.send(200, completion("", "length"))
            return True
        return False

    with ChatServer(short) as server:
        given = [path, "--judge", "llm", "--model", "m", "--base-url", server.url]
        assert judge(*given, "--max-tokens", 100) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "Some replies could not be read" in shown and "1 of 1 ended at the limit of 100 tokens" in shown
        server.requests.clear()
        assert judge(*given, "--max-tokens", 500) == 0 and len(server.requests) == 1
    assert [c.scores[-1] for c in Findings.load(path).captions] == WANTED


def failing(handler, body, known, count):
    if "unicorn" in known["caption"]:
        time.sleep(0.3)  # the others are answered by then
        handler.send(*handler.server.failure)
        return True
    return False


@pytest.mark.parametrize(
    ("status", "content", "kind", "says"),
    [
        (500, b'{"error": {"message": "oops"}}', "application/json", "refuses with 500 .*oops.*log"),
        (429, b'{"error": {"message": "quota"}}', "application/json", "refuses with 429 .*--in-flight"),
        (401, b'{"error": {"message": "bad key"}}', "application/json", "refuses with 401 .*OPENAI_API_KEY"),
        (404, b'{"error": {"message": "no model m"}}', "application/json", "refuses with 404 .*'m'"),
        (400, b'{"error": {"message": "bad\\nrequest"}}', "application/json", "refuses with 400 .*manual"),
        (200, b"<html>welcome</html>", "text/html", "not with a chat completion"),
        (200, b"{broken", "application/json", "not with a chat completion"),
        (200, b'{"choices": []}', "application/json", "not with a chat completion"),
        (200, b"[]", "application/json", "not with a chat completion"),
    ],
)
def test_an_endpoint_that_fails_for_good_is_named_and_nothing_is_lost(tmp_path, status, content, kind, says):
    with ChatServer(failing) as server:
        server._server.failure = (status, content, kind)
        with pytest.raises(JudgeError, match=says) as caught:
            ask(server, tmp_path, CAPTIONS, retries=1)
        assert server.url in str(caught.value) and "3 replies are kept in" in str(caught.value) and "\n" not in str(caught.value)
        server.misbehave = None
        before = Counter(server.asked)
        assert ask(server, tmp_path, CAPTIONS) == WANTED
        assert [key for key, n in (server.asked - before).items() for _ in range(n)] == ["I hear a unicorn, a cat 3."]


def test_a_dead_or_mute_endpoint_is_named(tmp_path):
    with ChatServer() as server:
        pass
    with pytest.raises(JudgeError, match=r"127.0.0.1:\d+/v1 cannot be reached .*refused.*--base-url"):
        ask(server, tmp_path, CAPTIONS, retries=1)
    with ChatServer(lambda h, *_: time.sleep(0.3) or True) as server, pytest.raises(JudgeError, match=r"did not answer within 0[.]1 s, 2 times"):
        ask(server, tmp_path, CAPTIONS, retries=1, timeout=0.1)


# ---------------------------------------------------------------- the command


def findings_with(captions):
    labels = {name: list(phrases) for name, phrases in LABELS.items()}
    return Findings("m", None, None, "test", "hash", 2, {}, labels=labels, captions=captions)


def judge(*arguments):
    return main(["judge", *map(str, arguments)])


def test_judge_command(tmp_path, capsys, sentence_model):
    path, other = tmp_path / "f.json", tmp_path / "deep" / "g.json"
    findings_with(CAPTIONS).save(path)
    assert judge(path) == 0
    with ChatServer() as server:
        assert judge(path, "--judge", "llm", "--base-url", server.url, "--model", "m", "--out", other) == 0
        assert (tmp_path / "f.replies.jsonl").exists()
        assert judge(other, "--judge", "llm", "--base-url", server.url, "--model", "m", "--cache", tmp_path / "f.replies.jsonl") == 0
        assert len(server.requests) == 4
    assert judge(other, "--judge", "embedding", "--model", sentence_model) == 0
    shown = capsys.readouterr().out
    assert "Spearman" in shown and "llm:m" in shown
    got = Findings.load(other)
    assert [s.judge for s in got.captions[0].scores] == ["labels", "llm:m", "embedding:tiny-bert"]
    assert [c.scores[1] for c in got.captions] == WANTED
    assert {row.judge for row in got.fidelity} == {"labels", "llm:m", "embedding:tiny-bert"}
    assert [s.judge for s in Findings.load(path).captions[0].scores] == ["labels"]  # --out leaves the first file as it was


def test_judge_command_refuses_in_one_line(tmp_path, capsys, sentence_model):
    path = tmp_path / "f.json"
    findings_with([]).save(path)

    def refused(*arguments):
        assert judge(*arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    assert "no captions" in refused(path)
    findings_with(CAPTIONS).save(path)
    before = path.read_bytes()
    assert "--base-url and --model" in refused(path, "--judge", "llm", "--model", "m")
    assert "--model" in refused(path, "--judge", "embedding")
    assert "no .safetensors" in refused(path, "--judge", "embedding", "--model", tmp_path)
    assert "--in-flight" in refused(path, "--in-flight", 0)
    assert "no such file" in refused(tmp_path / "none.json")
    with ChatServer() as server:
        pass
    line = refused(path, "--judge", "llm", "--model", "m", "--base-url", server.url, "--retries", 0)
    assert server.url in line and "0 replies are kept" in line
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert "bad.jsonl line 1" in refused(path, "--judge", "llm", "--model", "m", "--base-url", server.url, "--cache", tmp_path / "bad.jsonl")
    assert path.read_bytes() == before
    strange = findings_with(CAPTIONS)
    strange.labels.pop("dog")
    strange.save(path)
    assert "'a dog barking', which is not among the labels" in refused(path)


def test_a_killed_judge_goes_on_where_it_was(tmp_path):
    """SIGKILL in the middle: what was answered is not asked again, and the scores are those of a run that was never stopped."""
    captions = [caption(f"{i} {'a dog barking' if i % 3 else 'a unicorn'}", ("hear", "see", "both")[i % 2], name=str(i)) for i in range(40)]
    for name in ("killed", "whole"):
        findings_with(captions).save(tmp_path / f"{name}.json")
    before = (tmp_path / "killed.json").read_bytes()
    with ChatServer(seconds=0.05) as server:
        given = ["--judge", "llm", "--base-url", server.url, "--model", "m", "--in-flight", "3"]
        assert judge(tmp_path / "whole.json", *given) == 0
        server.asked.clear()
        command = [sys.executable, "-m", "analysis", "judge", str(tmp_path / "killed.json"), *given]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while sum(server.asked.values()) < 15 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        asked = sum(server.asked.values())
        assert 15 <= asked < 40 and (tmp_path / "killed.json").read_bytes() == before
        cache = tmp_path / "killed.replies.jsonl"
        kept = len(cache.read_bytes().splitlines())
        assert asked - 3 <= kept <= asked
        with cache.open("ab") as file:
            file.write(b'{"key": "torn')
        assert judge(tmp_path / "killed.json", *given) == 0
        twice = [key for key, n in server.asked.items() if n > 1]
        assert len(server.asked) == 40 and len(twice) <= 3 and max(server.asked.values()) <= 2
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()

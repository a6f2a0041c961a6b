import itertools
import re
import string

import numpy as np
import pytest

from keras_scratch_lstm.tracing.tokens import (
    token_features,
    tokens_of_sample,
    tokens_per_sample,
)

pytestmark = pytest.mark.one_backend

STORY = 'He said (very\nslowly): "It is 12:30." I ate 8 Figs [or so].\n' * 3


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("abc", ["abc"]),
        ([list("abc"), ("x", "y", "z")], ["abc", "xyz"]),
        (["abc", ["x", "y", "z"]], ["abc", "xyz"]),
        ([iter("abc"), (token for token in "xyz")], ["abc", "xyz"]),
        (np.array([list("abc"), list("xyz")]), ["abc", "xyz"]),
        (np.array([b"a", b"b", b"c"], "O"), ["abc"]),
        (np.array([[1, 2, 3], [4, 5, 6]]), ["123", "456"]),
    ],
)
def test_tokens_of_one_or_all_samples(tokens, expected):
    assert tokens_per_sample(tokens, batch=2, time=3) == [list(one) for one in expected]


def test_tokens_of_a_sample_are_its_own():
    assert tokens_of_sample(["abc", "xyz"], 2, 3, sample=1) == ["x", "y", "z"]
    assert tokens_of_sample(["<start>"], 1, 1, sample=0) == ["<start>"]


@pytest.mark.parametrize(
    ("tokens", "batch", "match"),
    [
        (itertools.count(), 2, "Received: 1 samples of 4 tokens"),
        (3, 2, "`tokens` must be a string or a list of 3 tokens, or a list of 2 of"),
        ("ab", 2, "must have 3 tokens, one per time step, .* 1 samples of 2 tokens"),
        ([["a", "b", "c"]] * 3, 2, "for each of 2. Received: 3 samples"),
        (["abc", "abc", "abc"], 3, "`tokens` is ambiguous: .* Pass a list of lists"),
    ],
)
def test_invalid_tokens_raise_error(tokens, batch, match):
    with pytest.raises(ValueError, match=match) as error:
        tokens_per_sample(tokens, batch, time=3)
    assert len(str(error.value)) < 300


def test_character_features():
    prefixes = [STORY[: t + 1] for t in range(len(STORY))]
    letters = np.char.lower(list(STORY))
    vowel = np.isin(letters, list("aeiouy"))
    expected = {
        "space": [c.isspace() for c in STORY],
        "newline": [c == "\n" for c in STORY],
        "vowel": vowel,
        "consonant": np.isin(letters, list(string.ascii_lowercase)) & ~vowel,
        "uppercase": [c in string.ascii_uppercase for c in STORY],
        "digit": [c in string.digits for c in STORY],
        "punctuation": [c in string.punctuation for c in STORY],
        "start of word": [re.search(r"(^|\s)\S$", p) is not None for p in prefixes],
        "position in word": [len(re.search(r"\S*\Z", p)[0]) for p in prefixes],
        "position in line": [len(p[:-1].rpartition("\n")[2]) for p in prefixes],
        "inside quotes": [p.count('"') % 2 == 1 for p in prefixes],
        "inside brackets": [
            len(re.findall(r"[(\[]", p)) > len(re.findall(r"[)\]]", p))
            for p in prefixes
        ],
    }
    features = token_features(STORY)
    assert set(features) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(features[name], values, err_msg=name)


def test_word_features():
    text = 'The time ( or so ) was 12 , he said . But 7 Owls ! 9 ( or 10 ) . "'
    words = text.split()
    expected = {
        "capitalized": ["The", "But", "Owls"],
        "number": ["12", "7", "9", "10"],
        "punctuation": [word for word in words if word in set('(),.!"')],
        "inside brackets": ["(", "or", "so", "(", "or", "10"],
    }
    features = token_features(words)
    assert set(features) == {*expected, "token length", "position in sentence"}
    for name, selected in expected.items():
        assert np.array(words)[features[name].astype(bool)].tolist() == selected
    np.testing.assert_array_equal(features["token length"], [len(w) for w in words])
    np.testing.assert_array_equal(
        features["position in sentence"], [*range(12), *range(4), *range(6), 0]
    )


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["0.25", "-1e3", "nan", "17"], set()),
        ("", set()),
        ("aaaa", set()),  # constant
        ("时间机器是一部小说时间机器是一部小说", set()),  # no words are known
        ("машина времени и люди и", {"space", "start of word", "position in word"}),
        (
            ["▁The", "▁time", "▁Was", "▁now", "▁Then", "▁so"],
            {"capitalized", "token length"},
        ),
    ],
)
def test_features_fit_the_tokens(tokens, expected):
    assert set(token_features(tokens)) == expected


def test_unbalanced_quotes_are_no_feature():
    assert "inside quotes" in token_features('a "bcd" e fgh')
    assert "inside quotes" not in token_features('a "bcd" e "fgh')
    assert "inside quotes" in token_features("a “bcd” e fgh")
    assert "inside quotes" not in token_features("a” bcd “e fgh” ijk")

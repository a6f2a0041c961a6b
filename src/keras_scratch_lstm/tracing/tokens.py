"""Tokens of a trace, per sample, and the features computed from them."""

import itertools
import unicodedata
from collections.abc import Sequence

import keras
import numpy as np

from keras_scratch_lstm import _validation

# Rarer events tell nothing about a unit.
_MIN_OCCURRENCES = 3


def tokens_per_sample(tokens, batch, time):
    """Return the tokens of one sample, or of all samples, as lists of strings.

    Args:
        tokens: One sample's tokens (a string or a list of `time` tokens), or a list
            of `batch` of these.
        batch: Integer, the number of samples.
        time: Integer, the number of time steps.
    """
    limit = max(batch, time)
    items = _to_list(tokens, limit)
    if items is None:
        rule = f"a string or a list of {time} tokens, or a list of {batch} of these"
        raise _validation.invalid("tokens", tokens, rule)
    samples = [_to_list(item, limit) for item in items]
    if isinstance(tokens, str) or not _are_samples(items, samples, batch, time):
        samples = [items]
    lengths = [0 if sample is None else len(sample) for sample in samples]
    if len(samples) not in (1, batch) or set(lengths) != {time}:
        raise ValueError(
            f"`tokens` must have {time} tokens, one per time step, for one sample or "
            f"for each of {batch}. Received: {len(samples)} samples of "
            f"{', '.join(map(str, lengths[:8]))} tokens"
        )
    return [[_to_string(token) for token in sample] for sample in samples]


def _are_samples(items, lists, batch, time):
    """Whether each item has the tokens of a sample, rather than being one token."""
    if any(
        one is not None and not isinstance(item, str | bytes)
        for item, one in zip(items, lists, strict=True)
    ):
        return True
    are_texts = len(items) == batch and all(
        isinstance(item, str) and len(item) == time for item in items
    )
    if are_texts and batch == time > 1:
        raise ValueError(
            f"`tokens` is ambiguous: {time} tokens of one sample, or the text of "
            f"{batch} samples. Pass a list of lists, one per sample."
        )
    return are_texts


def tokens_of_sample(tokens, batch, time, sample):
    """Return one sample's tokens as a list of strings; see `tokens_per_sample`."""
    samples = tokens_per_sample(tokens, batch, time)
    return samples[sample if len(samples) > 1 else 0]


def token_features(tokens: Sequence[str]) -> dict[str, np.ndarray]:
    """Compute features of tokens that a unit may be selective for.

    Characters have features of letters and of their position in words and lines,
    words have features of words, and numbers have none. A feature that is constant,
    or that occurs fewer than three times, is left out.

    Args:
        tokens: A string, or a list of strings.

    Returns:
        Dict of feature name -> array, as `GateTrace.correlate` takes it.
    """
    tokens = list(tokens)
    if all(map(_is_number, tokens)):
        return {}
    features = _character_features if are_characters(tokens) else _word_features
    return {
        name: values
        for name, values in features(tokens).items()
        if _is_informative(values)
    }


def are_characters(tokens):
    """Return whether most tokens are single characters."""
    return sum(len(token) > 1 for token in tokens) <= len(tokens) / 4


def line_layout(labels, line):
    """Return `(x, row, width)` of each label, in lines of `line` characters.

    Lines break between words.
    """
    separate = not are_characters(labels)
    boxes, word, x, row = [], [], 0, 0
    for k, label in enumerate(labels):
        word.append(max(1, len(label)) + separate)
        ends_line = label.endswith("⏎")
        ends_word = separate or not label.strip() or sum(word) == line
        if not (ends_word or ends_line or k + 1 == len(labels)):
            continue
        if x and x + sum(word) > line:
            x, row = 0, row + 1
        for width in word:
            boxes.append((x, row, width))
            x += width
        word = []
        if ends_line:
            x, row = 0, row + 1
    return boxes


def _character_features(tokens):
    space = _test(tokens, str.isspace)
    newline = _test(tokens, lambda token: "\n" in token)
    letters = [_latin_letter(token) for token in tokens]
    vowel = _test(letters, lambda letter: letter and letter in "aeiouy")
    features = {
        "space": space,
        "newline": newline,
        "vowel": vowel,
        "consonant": _test(letters, bool) & ~vowel,
        "uppercase": _test(tokens, str.isupper),
        "digit": _test(tokens, str.isdigit),
        "punctuation": _test(tokens, _is_punctuation),
    } | _nesting_features(tokens)
    if _is_informative(space):
        position = _steps_since(space)
        features["start of word"] = position == 1
        features["position in word"] = position
    if _is_informative(newline):
        after_newline = np.append(True, newline[:-1])
        features["position in line"] = _steps_since(after_newline)
    return features


def _word_features(tokens):
    end = _test(tokens, lambda token: token in {".", "!", "?", "。", "！", "？"})
    features = {
        "capitalized": _test(tokens, lambda token: token.lstrip("▁Ġ#")[:1].isupper()),
        "punctuation": _test(tokens, _is_punctuation),
        "number": _test(tokens, _is_number),
        "token length": np.array([len(token) for token in tokens]),
    } | _nesting_features(tokens)
    if _is_informative(end):
        features["position in sentence"] = _steps_since(np.append(True, end[:-1]))
    return features


def _nesting_features(tokens):
    """Return where the tokens are inside quotes and brackets, if these are balanced."""
    features = {}
    for name, opening, closing in [
        ("inside quotes", "“«", "”»"),
        ("inside brackets", "([{", ")]}"),
    ]:
        change = [(t in set(opening)) - (t in set(closing)) for t in tokens]
        depth = np.cumsum(change)
        if depth[-1] == 0 and (depth >= 0).all():
            features[name] = depth > 0
    straight = np.cumsum(_test(tokens, '"'.__eq__))
    if straight[-1] and straight[-1] % 2 == 0:
        features["inside quotes"] = straight % 2 == 1
    return features


def _is_informative(values):
    if values.dtype == bool:
        count = np.count_nonzero(values)
        return min(count, len(values) - count) >= _MIN_OCCURRENCES
    return np.ptp(values) > 0


def _test(tokens, condition):
    return np.array([bool(condition(token)) for token in tokens])


def _steps_since(event):
    """Return the number of time steps since the last event, or since the start."""
    step = np.arange(len(event))
    return step - np.maximum.accumulate(np.where(event, step, -1))


def _latin_letter(token):
    """Return a single letter in lower case and without accent, else an empty string."""
    letter = unicodedata.normalize("NFD", token)[:1].lower() if len(token) == 1 else ""
    return letter if letter.isascii() and letter.isalpha() else ""


def _is_punctuation(token):
    return token != "" and all(unicodedata.category(c)[0] in "PS" for c in token)


def _is_number(token):
    try:
        float(token)
    except ValueError:
        return False
    return True


def _to_list(value, limit):
    """Return a list of what the value iterates over, or `None` for a scalar.

    Other iterables than strings and lists may be endless, so it stops after `limit`.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    elif hasattr(value, "__array__") and not isinstance(value, str):
        value = _validation.to_numpy(value).tolist()
    try:
        is_finite = isinstance(value, (str, list, tuple))
        return list(value if is_finite else itertools.islice(value, limit + 1))
    except TypeError:
        return None


def _to_string(token):
    if keras.ops.is_tensor(token):
        token = keras.ops.convert_to_numpy(token).item()
    return token.decode("utf-8", "replace") if isinstance(token, bytes) else str(token)

"""Porter's stemmer, in the form of NLTK's default that ROUGE scores use: the rules of 1980 and NLTK's later ones.

Beyond the rules of 1980: a short list of irregular words, words of two letters are kept, -ies and -ied of four letters
end in -ie, y becomes i only behind a consonant that is not the first letter, -alli, -bli, -fulli, -logi, and a word of
a vowel and a consonant counts as ending in consonant, vowel, consonant.
"""

import functools

_IRREGULAR = {
    form: stem
    for stem, forms in {
        "sky": "sky skies",
        "die": "dying",
        "lie": "lying",
        "tie": "tying",
        "news": "news",
        "inning": "innings inning",
        "outing": "outings outing",
        "canning": "cannings canning",
        "howe": "howe",
        "proceed": "proceed",
        "exceed": "exceed",
        "succeed": "succeed",
    }.items()
    for form in forms.split()
}
_STEP_2 = (
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e ousli:ous ization:ize "
    "ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble fulli:ful"
)
_STEP_3 = "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:"
_STEP_4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(pair.partition(":")[0], pair.partition(":")[2]) for pair in text.split()]


_RULES_2, _RULES_3 = _pairs(_STEP_2), _pairs(_STEP_3)
_RULES_4 = [(suffix, "") for suffix in _STEP_4.split()]


def _shape(word: str) -> str:
    """c or v for each letter; y is a vowel behind a consonant."""
    kinds = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and kinds.endswith("c"))
        kinds += "v" if vowel else "c"
    return kinds


def _measure(stem: str) -> int:
    return _shape(stem).count("vc")


def _ends_short(word: str) -> bool:
    """Consonant, vowel, consonant, the last not w, x, y; or vowel and consonant alone."""
    kinds = _shape(word)
    return (kinds.endswith("cvc") and word[-1] not in "wxy") or kinds == "vc"


def _double_consonant(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _shape(word).endswith("c")


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    for suffix, cut in (("sses", 2), ("ies", 2), ("ss", 0), ("s", 1)):
        if word.endswith(suffix):
            return word[: len(word) - cut]
    return word


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) else word
    for suffix in ("ed", "ing"):
        stem = word.removesuffix(suffix)
        if stem != word and "v" in _shape(stem):
            break
    else:
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if _double_consonant(stem):
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _ends_short(stem) else stem


def _y(word: str) -> str:
    stem = word[:-1]
    return stem + "i" if word.endswith("y") and len(stem) > 1 and _shape(stem).endswith("c") else word


def _suffix(word: str, rules: list[tuple[str, str]], least: int) -> str:
    """The first rule whose suffix fits decides; it applies where the measure of the stem is at least `least`."""
    for suffix, new in rules:
        if word.endswith(suffix):
            stem = word[: len(word) - len(suffix)]
            return stem + new if _measure(stem) >= least else word
    return word


def _step_2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]):
        return _step_2(word[:-2])
    # Longer suffixes stand before shorter ones that end them; -logi keeps its l in the stem that is measured.
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) else word
    return _suffix(word, _RULES_2, 1)


def _step_4(word: str) -> str:
    if word.endswith("ion"):
        stem = word[:-3]
        return stem if _measure(stem) > 1 and stem[-1] in "st" else word
    return _suffix(word, _RULES_4, 2)


def _final(word: str) -> str:
    if word.endswith("e"):
        stem = word[:-1]
        if _measure(stem) > 1 or (_measure(stem) == 1 and not _ends_short(stem)):
            word = stem
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


@functools.lru_cache(maxsize=2**16)
def stem(word: str) -> str:
    """The stem of a word in lower case."""
    if word in _IRREGULAR or len(word) <= 2:
        return _IRREGULAR.get(word, word)
    word = _suffix(_step_2(_y(_past(_plural(word)))), _RULES_3, 1)
    return _final(_step_4(word))

"""ROUGE against all subsequences and, where it is installed, the package `rouge_score`; stems against NLTK's."""

import itertools
import random

import pytest

from hfext.metrics._porter import stem
from hfext.metrics._rouge import common_subsequence, rouge_1, rouge_l, words


def test_the_common_subsequence_is_the_longest_of_all():
    g = random.Random(0)
    for _ in range(200):
        a, b = ("".join(g.choices("abc", k=g.randrange(8))) for _ in range(2))
        subsequences = {"".join(s) for n in range(len(a) + 1) for s in itertools.combinations(a, n)}
        others = {"".join(s) for n in range(len(b) + 1) for s in itertools.combinations(b, n)}
        assert common_subsequence(a, b) == max(map(len, subsequences & others))
        assert common_subsequence(b, a) == common_subsequence(a, b)


def test_values_by_hand():
    found = rouge_l("The cat, on a mat!", "the black CAT sat on the mat")
    assert (found.recall, found.precision) == (4 / 7, 4 / 5)
    assert found.f1 == pytest.approx(2 / 3)
    assert rouge_l("b a", "a b").recall == 0.5 and rouge_1("b a", "a b").recall == 1
    assert rouge_1("a a a", "a b a").precision == pytest.approx(2 / 3)
    for empty in ("", "...", "é"):
        assert rouge_l(empty, "a") == rouge_l("a", empty) == rouge_1("", "")


def test_words_are_ascii_runs_and_short_ones_are_not_stemmed():
    assert words("Jaime's café: 08/09/1956_ok") == ["jaime", "s", "caf", "08", "09", "1956", "ok"]
    assert words("was running dogs", stemmer=True) == ["was", "run", "dog"]


STEMS = dict(
    pair.split(":")
    for pair in (
        "caresses:caress ponies:poni ties:tie dies:die cats:cat feed:feed agreed:agre plastered:plaster "
        "bled:bled motoring:motor sing:sing conflated:conflat troubled:troubl sized:size hopping:hop "
        "tanned:tan falling:fall hissing:hiss fizzed:fizz failing:fail filing:file happy:happi sky:sky "
        "dying:die enjoy:enjoy by:by relational:relat conditional:condit rational:ration valenci:valenc "
        "hesitanci:hesit digitizer:digit conformabli:conform radicalli:radic differentli:differ vileli:vile "
        "analogousli:analog vietnamization:vietnam predication:predic operator:oper feudalism:feudal "
        "decisiveness:decis hopefulness:hope callousness:callous formaliti:formal sensitiviti:sensit "
        "sensibiliti:sensibl triplicate:triplic formative:form formalize:formal electriciti:electr "
        "electrical:electr hopeful:hope goodness:good revival:reviv allowance:allow inference:infer "
        "airliner:airlin gyroscopic:gyroscop adjustable:adjust defensible:defens irritant:irrit "
        "replacement:replac adjustment:adjust dependent:depend adoption:adopt homologou:homolog "
        "communism:commun activate:activ angulariti:angular homologous:homolog effective:effect "
        "bowdlerize:bowdler probate:probat rate:rate cease:ceas controll:control roll:roll spied:spi died:die "
        "basically:basic geology:geolog biologi:biolog news:news innings:inning succeed:succeed eye:eye "
        "using:use oed:o carefulli:care ion:ion mission:mission apology:apolog authored:author "
        "literary:literari awarded:award ideology:ideolog theologi:theolog psychologi:psycholog ologi:olog logi:logi "
    ).split()
)


def test_stems_are_those_of_nltk():
    assert {word: stem(word) for word in STEMS} == STEMS


def test_rouge_score_agrees():
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    g = random.Random(0)
    vocabulary = [*STEMS, "the", "a", "of", "1956", "08/09"]
    for stemmer in (False, True):
        theirs = scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer)
        for _ in range(250):
            prediction, reference = (" ".join(g.choices(vocabulary, k=g.randrange(12))) for _ in range(2))
            expected = theirs.score(reference, prediction)
            for name, ours in (("rouge1", rouge_1), ("rougeL", rouge_l)):
                found, want = ours(prediction, reference, stemmer), expected[name]
                assert (found.recall, found.precision, found.f1) == pytest.approx(
                    (want.recall, want.precision, want.fmeasure)
                )

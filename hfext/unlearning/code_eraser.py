"""CodeEraser: ascent on the tokens of marked segments alone, the code around them held.

    S   scored tokens that overlap a marked span, C the other scored tokens of forget rows
    loss = -gamma L_S + alpha L_C + lam KL(p_ref || p),    L the mean nll over the tokens of S or C

With everything marked and alpha = lam = 0 it is gradient ascent; with nothing marked it is fine-tuning. Rows name
their spans by `segments`, characters of the answer or text, or by `segment_mask`, one number a token.

Scrub It Out! Erasing Sensitive Memorization in Code Language Models via Machine Unlearning, arXiv 2509.13755.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..registry import Method
from ._objective import Objective, check, finite
from ._terms import Term, kl_rows


@dataclass(frozen=True, kw_only=True)
class CodeEraserConfig:
    """Options of [`CodeEraser`].

    Args:
        gamma, alpha, lam: Weights of the segments, of their context and of the divergence, >= 0.
        kl_on: Where the divergence is taken: `context`, `segment`, or `retain` (the retain rows).
    """

    gamma: float = 1.0
    alpha: float = 1.0
    lam: float = 1.0
    kl_on: Literal["context", "segment", "retain"] = "context"

    def __post_init__(self):
        finite(self, "gamma", "alpha", "lam")
        check(self, "kl_on", self.kl_on in ("context", "segment", "retain"), "'context', 'segment' or 'retain'")


def marked(batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions [rows, T - 1] are scored and in a segment."""
    labels = batch["labels"][:, 1:]
    return (labels != -100) & batch["segment_mask"][:, 1:].bool()


class CodeEraser(Objective):
    """Forget marked segments, keep their context: `UnlearningConfig(objective="code_eraser")`."""

    Config = CodeEraserConfig

    def __init__(self, **options):
        super().__init__(**options)
        c = self.config
        part = "retain" if c.kl_on == "retain" else "forget"
        self.needs = ("forget", "retain") if part == "retain" and c.lam else ("forget",)
        self.reference = {part: "outputs"} if c.lam else {}

    def prepare(self, model, data):
        rows = data.parts["forget"]
        if not any("segment_mask" in row for row in rows):
            raise ValueError("code_eraser: no forget row has `segments` (character spans) or `segment_mask`.")
        for row in rows:
            row.setdefault("segment_mask", [0] * len(row["input_ids"]))

    def counts(self, batch):
        found = super().counts(batch)
        segment = marked(batch["forget"]).sum()
        return {**found, "segment tokens": segment, "context tokens": found["forget tokens"] - segment}

    def forward(self, model, batch, **kwargs):
        now = super().forward(model, batch, **kwargs)
        if "forget" in now:
            now["forget"].segment = marked(batch["forget"]).to(now["forget"].labels.device)
        return now

    def with_row_loss(self, now, of_tokens):
        found = super().with_row_loss(now, of_tokens)
        found["forget"].segment = now["forget"].segment
        return found

    def terms(self, now, reference):
        c, forget = self.config, now["forget"]
        inside = forget.token_nll * forget.segment
        found = {
            "segment": Term(inside.sum(), "segment tokens", -c.gamma),
            "context": Term((forget.token_nll - inside).sum(), "context tokens", c.alpha),
        }
        if c.lam:
            part = "retain" if c.kl_on == "retain" else "forget"
            divergence = kl_rows(reference[part].log_probs, now[part].log_probs)
            if part == "forget":
                segment = forget.segment[forget.mask]
                divergence = divergence * (segment if c.kl_on == "segment" else ~segment)
            per = {"retain": "retain tokens", "segment": "segment tokens", "context": "context tokens"}[c.kl_on]
            found["kl"] = Term(divergence.sum(), per, c.lam)
        return found


METHOD = Method(
    name="code_eraser",
    family="unlearning",
    title="Scrub It Out! Erasing Sensitive Memorization in Code Language Models via Machine Unlearning",
    authors="Chu et al.",
    arxiv="2509.13755",
    year=2025,
    status="abstract-only",
    difference="The abstract and public summaries say what is forgotten and what is held; where the divergence is "
    "taken is an option here, on the context by default, and the weights of 1 are ours.",
    target="hfext.unlearning.code_eraser:CodeEraser",
    config=CodeEraserConfig,
    usage='UnlearningTrainer(model, UnlearningConfig("out", objective="code_eraser"), rows_with_segments)',
    summary="Forgets marked segments of a text and keeps the text around them.",
    notes="No recipe: its benchmark, secrets memorised by a code model, is not to be had here.",
)
